"""The command line: parse, call, print."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from autoglm_compress.errors import Terminated, UserError
from autoglm_compress.memory import keep_freed_memory
from autoglm_compress.threads import sleep_soon

app = typer.Typer(
    help="Turn a large language model into one that fits a phone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}
"""Of `compare`; 2 is what the user can put right."""


class Device(str, Enum):
    """Where layers run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExportTo(str, Enum):
    """What a checkpoint is exported to."""

    gguf = "gguf"
    mnn = "mnn"
    onnx = "onnx"


MemoryLimit = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Refuse stages that may need more memory, such as 8GB. \\[default: none]"),
]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/demo.yaml.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as stages.ffn.method=random."),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Where results go. \\[default: runs/NAME-OF-RECIPE]")
]


FamilyFile = Annotated[
    str | None,
    typer.Option("--family", metavar="FILE", help="A YAML that describes the model's family. \\[default: a known one]"),
]


@contextmanager
def _one_message(stopped: str = "stopped") -> Iterator[None]:
    """End in one message: what the user can put right with exit code 2, and `stopped` at Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (KeyboardInterrupt, Terminated) as error:
        typer.echo(f"\n{stopped}", err=True)
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise Terminated


def _quiet_transformers() -> None:
    """Its bars and advice would stand between ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"autoglm-compress {version('autoglm-compress')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn a large language model into one that fits a phone."""
    keep_freed_memory()
    sleep_soon()


@app.command()
def run(
    recipe: RecipeFile,
    output: Output = None,
    assignments: Assignments = None,
    device: Annotated[Device, typer.Option(help="Where layers run.")] = Device.auto,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and those after it again.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what earlier runs of the recipe made first.")] = False,
    memory_limit: MemoryLimit = None,
) -> None:
    """Run a recipe, stage by stage.

    Every stage leaves a checkpoint that plain transformers loads.
    Finished stages are skipped, an interrupted one goes on where it was.
    """
    with _one_message("stopped: what is finished is kept, and the same command goes on at the layer it had reached"):
        from autoglm_compress.pipeline import RunOptions, run_recipe
        from autoglm_compress.progress import Progress
        from autoglm_compress.recipe import load_recipe

        _quiet_transformers()
        loaded = load_recipe(recipe, assignments or ())
        options = RunOptions(output or Path("runs") / loaded.name, device.value, first, last, fresh, memory_limit)
        run_recipe(loaded, options, Progress(Console()))


@app.command()
def plan(
    recipe: RecipeFile,
    output: Output = None,
    assignments: Assignments = None,
    memory_limit: MemoryLimit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Show what a recipe will do, reading no weights.

    Sizes after every stage, the memory it needs, disk, and warnings.
    """
    with _one_message():
        from autoglm_compress.pipeline import plan_recipe, with_texts
        from autoglm_compress.pipeline.metrics import human, plan_table
        from autoglm_compress.pipeline.plan import bytes_of
        from autoglm_compress.recipe import load_recipe

        _quiet_transformers()
        loaded = load_recipe(recipe, assignments or ())
        planned = plan_recipe(loaded, output or Path("runs") / loaded.name)
        planned = with_texts(planned, planned.folder)
        if memory_limit is not None:
            planned.require_memory(bytes_of(memory_limit), range(len(loaded.stages)))
        if as_json:
            typer.echo(json.dumps(planned.as_data(), indent=2))
            return
        console = Console()
        console.print(plan_table(planned))
        typer.echo("\nKV/1k: 16-bit cache of 1000 tokens. RAM: estimated peak.")
        kept = "" if loaded.keep == "all" else f" at most, {human(planned.kept_bytes)}B for what is kept"
        typer.echo(f"disk: {human(planned.disk_bytes)}B needed{kept}, {human(planned.free_bytes)}B free")
        for warning in planned.warnings():
            typer.echo(f"warning: {warning}")


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder with config and safetensors.")],
    family: FamilyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint is: family, shape, parameters by part, dtypes, quantization."""
    with _one_message():
        from autoglm_compress.inspection import inspect_checkpoint, print_inspection

        _quiet_transformers()
        found = inspect_checkpoint(checkpoint, _family(family))
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            print_inspection(found, Console())


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder with config and safetensors.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Where results go, such as results.json.")],
    tasks: Annotated[
        str, typer.Option(metavar="NAME,…", help="mmlu, perplexity, any log-likelihood task of lm-eval.")
    ] = "mmlu,perplexity",
    mmlu: Annotated[
        str | None, typer.Option(metavar="DIR", help="MMLU as CSV files in dev/ and test/. \\[default: from the hub]")
    ] = None,
    subjects: Annotated[str | None, typer.Option(metavar="NAME,…", help="Of MMLU. \\[default: all]")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each subject, the same every time. \\[default: all]")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each question. \\[default: 5]")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Text for perplexity, as recipes name it. \\[default: python-docs]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Rows of that text. \\[default: 64]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row. \\[default: 512, or fewer if the model reads fewer]")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A checkpoint to compare predictions with, on the same text.")
    ] = None,
    family: FamilyFile = None,
    device: Annotated[Device, typer.Option(help="Where layers run.")] = Device.auto,
) -> None:
    """Measure a checkpoint, quantized or not: MMLU, perplexity, other tasks of lm-eval.

    Every question's log-likelihoods are kept, so that `compare` can tell a change from chance.
    An interrupted evaluation goes on where it was. Batches are sized by tokens, and scores do not depend on them.
    """
    with _one_message():
        from autoglm_compress.evaluation.command import EvaluationRequest, evaluate_checkpoint
        from autoglm_compress.evaluation.table import evaluation_table
        from autoglm_compress.progress import Progress

        _quiet_transformers()
        names = _names(tasks)
        chosen = {"data": mmlu, "subjects": subjects and _names(subjects), "limit": limit, "num_fewshot": num_fewshot}
        rows = {"source": text, "samples": samples, "sequence_length": sequence_length}
        request = EvaluationRequest(
            checkpoint, names, output, _given(chosen), _given(rows), against, device.value, _family(family)
        )
        console = Console()
        console.print(evaluation_table(evaluate_checkpoint(request, Progress(console))))
        typer.echo(f"results: {output}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder with config and safetensors.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the files go.")],
    format_: Annotated[
        ExportTo, typer.Option("--format", help="gguf is for llama.cpp and Ollama, mnn for MNN, onnx for ONNX Runtime.")
    ],
    embedding_bits: Annotated[
        int | None, typer.Option(metavar="8", help="Of embedding and head. \\[default: as the checkpoint has them]")
    ] = None,
    accuracy_level: Annotated[
        int | None, typer.Option(metavar="0|4", help="Of ONNX Runtime's products: 0 in fp32. \\[default: 4, fast]")
    ] = None,
    called: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the model is called. \\[default: the folder's name]")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Text for the proof, as recipes name it. \\[default: python-docs]"),
    ] = None,
    family: FamilyFile = None,
    device: Annotated[Device, typer.Option(help="Where the reference for the proof runs.")] = Device.auto,
) -> None:
    """Write a checkpoint as files that an engine runs, and prove that the engine predicts the same.

    Integers and scales are kept as they are. What the engine does not predict alike is not kept.
    An interrupted export begins again, and leaves the same bytes.
    """
    with _one_message():
        from pydantic import ValidationError

        from autoglm_compress.export.command import ExportRequest, export_checkpoint
        from autoglm_compress.export.options import ExportOptions
        from autoglm_compress.progress import Progress

        _quiet_transformers()
        try:
            options = ExportOptions(
                format=format_.value, embedding_bits=embedding_bits, accuracy_level=accuracy_level, called=called
            )
        except ValidationError as error:
            option = str(error.errors()[0]["loc"][0]).replace("_", "-")
            raise UserError(f"--{option}: given {error.errors()[0]['input']!r}: {error.errors()[0]['msg']}.") from None
        request = ExportRequest(checkpoint, output, options, text, device.value, _family(family))
        export_checkpoint(request, Progress(Console()))
        typer.echo(f"export: {output}")


def _family(file: str | None) -> Any:
    """The family that a file describes, if one is given."""
    from autoglm_compress.architecture import named_family, read_family

    return None if file is None else read_family(named_family(file, [Path.cwd()], "--family"))


def _names(listed: str) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in listed.split(",")))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A results file of `evaluate`.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another, on the same questions and text.")],
    max_drop: Annotated[
        float | None, typer.Option(metavar="POINTS", help="Accuracy that may be lost on MMLU. \\[default: 1]")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Perplexity that may be gained. \\[default: not gated]")
    ] = None,
    max_divergence: Annotated[
        float | None, typer.Option(metavar="NATS", help="From the source's predictions. \\[default: not gated]")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Tokens likeliest to the source too. \\[default: not gated]"),
    ] = None,
    max_loss: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK:METRIC=AMOUNT", help="How much worse a metric of lm-eval may be; repeatable."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="With which each bound holds.")] = 0.95,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a summary for a CI job.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a test case per verdict.")] = None,
) -> None:
    """Tell whether NEW is worse than BASE by more than allowed: paired, on the same questions.

    Divergence and agreement are what `evaluate NEW --against SOURCE` found.
    Exit code 0: no. 1: yes. 3: the questions are too few to tell. 2: the two cannot be compared.
    """
    with _one_message():
        from autoglm_compress.comparison import summaries
        from autoglm_compress.comparison.compare import compare as compare_results
        from autoglm_compress.comparison.limits import Limits, parse_losses
        from autoglm_compress.comparison.results_file import read_results

        losses = parse_losses(max_loss or ())
        limits = Limits(max_drop, max_perplexity_increase, max_divergence, min_agreement, losses, confidence)
        comparison = compare_results(read_results(base), read_results(new), limits)
        for file, write in (
            (json_file, summaries.as_json),
            (markdown, summaries.as_markdown),
            (junit, summaries.as_junit),
        ):
            if file is not None:
                summaries.write_summary(file, write(comparison))
        Console().print(summaries.comparison_table(comparison))
        typer.echo("\n" + "\n".join(summaries.conclusions(comparison)))
        raise typer.Exit(EXIT_CODES[comparison.verdict.value])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A folder that `run` wrote, or several.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where the page goes. \\[default: report.html or comparison.html in the (first) RUN]"
        ),
    ] = None,
) -> None:
    """Write a run as one HTML page with tables and figures, or compare several.

    The page needs no network: it can be sent, kept and printed.
    """
    with _one_message():
        from autoglm_compress.report.comparison_page import COMPARISON, write_comparison_page
        from autoglm_compress.report.page import REPORT, write_run_page

        if len(runs) == 1:
            from autoglm_compress.stages.drawing import draw  # takes seconds, and a comparison does without

            output = output or runs[0] / REPORT
            write_run_page(runs[0], draw, output)
        else:
            output = output or runs[0] / COMPARISON
            write_comparison_page(runs, output)
        typer.echo(f"report: {output}")
