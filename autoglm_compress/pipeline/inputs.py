"""The inputs of a run, found and opened before anything is hashed, decided or written."""

from dataclasses import dataclass
from pathlib import Path

from autoglm_compress.calibration.run_text import CalibrationText
from autoglm_compress.checkpoint import Checkpoint, resolve_source
from autoglm_compress.checkpoint.plain_verdict import require_loadable
from autoglm_compress.checkpoint.processor import require_processor
from autoglm_compress.errors import UserError, listed
from autoglm_compress.evaluation.run_results import Evaluations, find_data
from autoglm_compress.forward.features import Features, with_features_of
from autoglm_compress.forward.one_layer_model import compute_dtype
from autoglm_compress.pipeline.plan import Plan, plan_recipe
from autoglm_compress.pipeline.run_folder import RunFolder
from autoglm_compress.pipeline.texts import longest_rows, with_texts
from autoglm_compress.recipe import Recipe
from autoglm_compress.records.files import EVALUATIONS
from autoglm_compress.runtime import Runtime


@dataclass(frozen=True)
class RunOptions:
    """The options of the command line for a run."""

    output: Path
    device: str = "auto"
    first: str | None = None
    last: str | None = None
    fresh: bool = False
    memory_limit: int | None = None


@dataclass(frozen=True)
class RunInputs:
    """A recipe, the files that it names, and the output folder. `chosen` has the numbers of the stages from first to
    last.
    """

    recipe: Recipe
    options: RunOptions
    runtime: Runtime
    chosen: range
    folder: RunFolder
    plan: Plan
    source: Checkpoint
    text: CalibrationText
    evaluations: Evaluations

    @property
    def names(self) -> list[str]:
        """The folders of all stages, in order."""
        return [self.recipe.folder_name(number) for number in range(len(self.recipe.stages))]

    def open_other(self, name: str, option: str) -> Checkpoint:
        """A checkpoint, other than source and parent, that an option of a stage names."""
        other = Checkpoint(resolve_source(name, self.recipe.bases, option), self.source.family)
        require_loadable(other)
        return with_features_of(other, self.source)


def find_inputs(recipe: Recipe, options: RunOptions, runtime: Runtime) -> RunInputs:
    """Find all inputs of a run.

    Raises:
        UserError: the recipe or the command line names something that does not exist or is not valid.
    """
    chosen = _chosen(recipe, options)
    folder = RunFolder(options.output, recipe.name)
    plan = plan_recipe(recipe, options.output)
    source = Checkpoint(resolve_source(recipe.model.source, recipe.bases), recipe.family())
    require_loadable(source)
    source.require_tokenizer()
    require_processor(source.folder, source.family)
    if source.left_out:
        runtime.progress.note(f"left out, as the model does not use them: {listed(source.left_out)}")
    plan = with_texts(plan, source.folder)
    recipe = plan.recipe
    text = CalibrationText(recipe.calibration, plan.texts, source, runtime.progress, longest_rows(recipe))
    if text.media is not None:
        work = folder.work / f"features-{runtime.processes.rank}"
        source.features = Features(source, text.media, work, runtime, compute_dtype(source, runtime.device))
    evaluations = Evaluations(
        recipe.evaluation,
        find_data(recipe.evaluation, recipe.bases, default_text=next(iter(plan.texts.values()))),
        folder=folder.path / EVALUATIONS,
        work=folder.work,
        seed=recipe.seed,
        runtime=runtime,
    )
    return RunInputs(recipe, options, runtime, chosen, folder, plan, source, text, evaluations)


def _chosen(recipe: Recipe, options: RunOptions) -> range:
    """The stages that `--from` and `--until` select."""
    labels = recipe.labels()
    for option, label in (("--from", options.first), ("--until", options.last)):
        if label is not None and label not in labels:
            raise UserError(f"{option}: no stage {label!r} in the recipe; there are {', '.join(labels)}.")
    first = labels.index(options.first) if options.first else 0
    last = labels.index(options.last) if options.last else len(labels) - 1
    if first > 0 and options.fresh:
        raise UserError("--fresh starts from the first stage, and cannot go with --from.")
    if first > last:
        raise UserError(f"--from {options.first} comes after --until {options.last}.")
    return range(first, last + 1)
