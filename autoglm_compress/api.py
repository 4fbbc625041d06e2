"""What the package does, as functions: the command line calls them, and Python programs do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console

from autoglm_compress.architecture import named_family, read_family
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.comparison.compare import Comparison
from autoglm_compress.comparison.compare import compare as compare_results
from autoglm_compress.comparison.limits import Limits
from autoglm_compress.comparison.results_file import read_results
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.command import EvaluationRequest, evaluate_checkpoint
from autoglm_compress.evaluation.evaluate import EvaluationOptions
from autoglm_compress.pipeline import RunOptions, plan_recipe, run_recipe, with_texts
from autoglm_compress.pipeline.plan import bytes_of
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import Recipe, load_recipe
from autoglm_compress.recipe.problems import from_validation
from autoglm_compress.records.evaluation import EvaluationRecord
from autoglm_compress.records.plan import PlanRecord
from autoglm_compress.records.run import RunResult, run_result

__all__ = ["Checkpoint", "UserError", "compare", "evaluate", "load_recipe", "plan", "run"]

Place = str | Path
"""A file or a folder."""
Device = Literal["auto", "cpu", "cuda"]
TASKS = ("mmlu", "perplexity")


def plan(recipe: Recipe | Place, output: Place | None = None, *, memory_limit: str | None = None) -> PlanRecord:
    """Plan a recipe, reading no weights: shapes, sizes, memory, disk, warnings.

    Args:
        recipe: what `load_recipe` gave, or what it takes.
        output: the folder that a run would write to; the disk it is on counts. `runs/NAME` by default.
        memory_limit: a size such as `8GB`: stages that may need more are refused.

    Raises:
        UserError: the recipe, its source or a text cannot be used, or the limit is too low.
    """
    loaded = _recipe(recipe)
    planned = plan_recipe(loaded, _output(loaded, output))
    planned = with_texts(planned, planned.folder)
    if memory_limit is not None:
        planned.require_memory(bytes_of(memory_limit), range(len(loaded.stages)))
    return planned.record()


def run(
    recipe: Recipe | Place,
    output: Place | None = None,
    *,
    device: Device = "auto",
    first: str | None = None,
    last: str | None = None,
    fresh: bool = False,
    memory_limit: str | None = None,
    progress: bool = False,
) -> RunResult:
    """Run a recipe, stage by stage. What an earlier run into the same folder finished is reused.

    Args:
        recipe: what `load_recipe` gave, or what it takes.
        output: the folder of the results; `runs/NAME` by default.
        device: where layers run.
        first: the stage, by its label, from which all is done again (`--from`).
        last: the stage to stop after (`--until`).
        fresh: whether to delete first what earlier runs of the recipe made.
        memory_limit: a size such as `8GB`: stages that may need more are refused.
        progress: whether to print how it goes.

    Raises:
        UserError: something that the recipe names, the folder or the disk does not allow it.
    """
    loaded = _recipe(recipe)
    options = RunOptions(_output(loaded, output), device, first, last, fresh, memory_limit)
    return run_result(run_recipe(loaded, options, _progress(progress)))


def evaluate(
    checkpoint: Place,
    output: Place,
    tasks: Sequence[str] = TASKS,
    *,
    mmlu: Place | None = None,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    text: str | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    against: Place | None = None,
    family: Place | None = None,
    device: Device = "auto",
    progress: bool = False,
) -> EvaluationRecord:
    """Measure a checkpoint, and write a file that `compare` reads. An interrupted evaluation goes on where it was.

    Args:
        checkpoint: a folder with config, tokenizer and safetensors.
        output: the file that results go to.
        tasks: `mmlu`, `perplexity` and any log-likelihood task of lm-eval.
        mmlu: a folder with questions as CSV files in `dev/` and `test/`; MMLU itself, from the hub, by default.
        subjects: of MMLU; all by default.
        limit: questions of each subject, the same every time; all by default.
        num_fewshot: worked examples before each question; 5 by default.
        text: for perplexity, as recipes name it; `python-docs` by default.
        samples: rows of that text; 64 by default.
        sequence_length: tokens of a row; 512 by default, or fewer if the model reads fewer.
        against: a checkpoint to compare predictions with, on the same text.
        family: a YAML file that describes the model's family, if that is none of the known ones.
        device: where layers run.
        progress: whether to print how it goes.

    Returns:
        What was written: the result of each task, with the log-likelihoods of every question and row.

    Raises:
        UserError: an option cannot be, or what it names is not there or not as it should be.
    """
    questions = {
        "data": None if mmlu is None else str(mmlu),
        "subjects": subjects,
        "limit": limit,
        "num_fewshot": num_fewshot,
    }
    rows = {"source": text, "samples": samples, "sequence_length": sequence_length}
    request = EvaluationRequest(
        Path(checkpoint),
        tasks,
        Path(output),
        _evaluation_options(mmlu=_given(questions), perplexity=_given(rows)),
        None if against is None else Path(against),
        device,
        None if family is None else read_family(named_family(str(family), [Path.cwd()], "--family")),
    )
    return evaluate_checkpoint(request, _progress(progress))


def compare(
    base: Place,
    new: Place,
    *,
    max_drop: float | None = None,
    max_perplexity_increase: float | None = None,
    max_divergence: float | None = None,
    min_agreement: float | None = None,
    max_loss: Mapping[str, float] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Tell whether one checkpoint is worse than another by more than allowed, on the same questions and text.

    Args:
        base: a results file of `evaluate`, or one of the `evaluations` folder of a run.
        new: another.
        max_drop: points of accuracy that may be lost on MMLU; 1 by default, if both were asked.
        max_perplexity_increase: in percent of the base's; not gated by default, as the following.
        max_divergence: in nats, of the new model's predictions from those of `evaluate`'s `against`.
        min_agreement: percent of tokens that the new model and `against` both find likeliest.
        max_loss: how much worse a metric of another task may be, by `task:metric`, in its own unit.
        confidence: with which each bound holds.

    Raises:
        UserError: a limit cannot be, or the two cannot be compared.
    """
    limits = Limits(max_drop, max_perplexity_increase, max_divergence, min_agreement, max_loss or {}, confidence)
    return compare_results(read_results(Path(base)), read_results(Path(new)), limits)


def _recipe(recipe: Recipe | Place) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _output(recipe: Recipe, output: Place | None) -> Path:
    return Path("runs") / recipe.name if output is None else Path(output)


def _progress(shown: bool) -> Progress:
    return Progress(Console(quiet=not shown))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _evaluation_options(**options: dict[str, Any]) -> EvaluationOptions:
    """Raise UserError, which names the options as recipes do, if one cannot be."""
    try:
        return EvaluationOptions.model_validate(options)
    except ValidationError as error:
        problems = from_validation(error, (), EvaluationOptions)
        lines = (f"{'.'.join(map(str, problem.path))}: {problem.message}" for problem in problems)
        raise UserError("\n".join(lines)) from None
