"""Commands on one checkpoint: `inspect`, `evaluate`, `export`, `push`; and `compare` on two evaluations."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autoglm_compress.commands.behaviour import one_message, quiet_transformers
from autoglm_compress.commands.options import Device, FamilyFile, MemoryLimit, family_in

EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}
"""Exit codes of `compare`. 2 is for errors that the user can fix."""


class ExportTo(str, Enum):
    """What a checkpoint is exported to."""

    gguf = "gguf"
    mnn = "mnn"
    onnx = "onnx"


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder with config and safetensors.")],
    family: FamilyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint is: family, shape, parameters by part, dtypes, quantization."""
    with one_message():
        from autoglm_compress.inspection import inspect_checkpoint, print_inspection

        quiet_transformers()
        found = inspect_checkpoint(checkpoint, family_in(family))
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            print_inspection(found, Console())


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder with config and safetensors.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Where results go, such as results.json.")],
    tasks: Annotated[
        str, typer.Option(metavar="NAME,…", help="mmlu, perplexity, generate, log-likelihood tasks of lm-eval.")
    ] = "mmlu,perplexity",
    mmlu: Annotated[
        str | None, typer.Option(metavar="DIR", help="MMLU as CSV files in dev/ and test/. \\[default: from the hub]")
    ] = None,
    subjects: Annotated[str | None, typer.Option(metavar="NAME,…", help="Of MMLU. \\[default: all]")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each subject, rows of generate. \\[default: all]")
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
    answers: Annotated[bool, typer.Option("--answers", help="Perplexity of the last messages of chats alone.")] = False,
    generate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Chats whose last message is the right answer, for generate.")
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(metavar="case,space", help="What does not count in generated answers.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a generated answer. \\[default: from the longest right one]")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A checkpoint to compare predictions with, on the same text.")
    ] = None,
    attention: Annotated[
        Path | None, typer.Option(metavar="FILE", help="attention.json: measure with few tokens read, as it says.")
    ] = None,
    family: FamilyFile = None,
    device: Annotated[Device, typer.Option(help="Where layers run.")] = Device.auto,
) -> None:
    """Measure a checkpoint, quantized or not: MMLU, perplexity, other tasks of lm-eval, generated answers.

    Every question's log-likelihoods or answer are kept, so that `compare` can tell a change from chance.
    An interrupted evaluation continues where it stopped. Batches are sized by tokens; scores do not depend on them.
    """
    with one_message():
        from autoglm_compress.api import measuring
        from autoglm_compress.evaluation.table import evaluation_table

        quiet_transformers()
        record = measuring.evaluate(
            checkpoint,
            output,
            _names(tasks),
            mmlu=mmlu,
            subjects=_names(subjects) if subjects else None,
            limit=limit,
            num_fewshot=num_fewshot,
            text=text,
            samples=samples,
            sequence_length=sequence_length,
            answers=answers,
            generate=generate,
            ignore=_names(ignore) if ignore else None,
            max_new_tokens=max_new_tokens,
            against=against,
            attention=attention,
            family=family,
            device=device.value,
            progress=True,
        )
        Console().print(evaluation_table(record))
        typer.echo(f"results: {output}")


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
    memory_limit: MemoryLimit = None,
) -> None:
    """Write a checkpoint as files that an engine runs, and prove that the engine predicts the same.

    Integers and scales are kept unchanged. If the engine's predictions differ, the export fails and is not kept.
    An interrupted export begins again, and leaves the same bytes.
    """
    with one_message():
        from autoglm_compress.api import exporting

        quiet_transformers()
        exporting.export_checkpoint(
            checkpoint,
            output,
            format_.value,
            embedding_bits=embedding_bits,
            accuracy_level=accuracy_level,
            called=called,
            text=text,
            family=family,
            device=device.value,
            memory_limit=memory_limit,
            progress=True,
        )
        typer.echo(f"export: {output}")


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint, an export, or RUN/STAGE.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to on the hub: OWNER/NAME.")],
    upload: Annotated[bool, typer.Option("--upload", help="Upload. \\[default: show what would be]")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a repo that nobody else can see.")] = False,
    family: FamilyFile = None,
) -> None:
    """Upload a checkpoint or an export with its model card to the Hugging Face hub.

    A checkpoint without a card gets one: sizes, what each stage cost, the recipe. Records of the run stay here.
    """
    with one_message():
        from autoglm_compress.api import publishing
        from autoglm_compress.report.numbers import size

        quiet_transformers()
        found = publishing.push(folder, repo, upload=upload, private=private, family=family)
        if found.card is not None and not upload:
            typer.echo(f"The model card, README.md:\n\n{found.card}")
        for name, count in found.files.items():
            typer.echo(f"{size(count):>9}  {name}")
        typer.echo(f"{size(found.bytes):>9}  in all")
        if upload:
            typer.echo(f"uploaded: {found.url}")
        else:
            seen = "private" if private else "public"
            typer.echo(f"to: {found.url} ({seen} if it is made anew)\nnothing was uploaded: add --upload to do it")


def _names(listed: str) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in listed.split(",")))


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
    with one_message():
        from autoglm_compress.api import comparing
        from autoglm_compress.comparison import summaries
        from autoglm_compress.comparison.limits import parse_losses

        comparison = comparing.compare(
            base,
            new,
            max_drop=max_drop,
            max_perplexity_increase=max_perplexity_increase,
            max_divergence=max_divergence,
            min_agreement=min_agreement,
            max_loss=parse_losses(max_loss or ()),
            confidence=confidence,
        )
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
