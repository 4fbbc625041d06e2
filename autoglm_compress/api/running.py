"""Planning and running recipes."""

from pathlib import Path

from autoglm_compress.api.arguments import Device, Place, shown_progress
from autoglm_compress.pipeline import RunOptions, plan_recipe, run_recipe, with_texts
from autoglm_compress.pipeline.plan import bytes_of
from autoglm_compress.recipe import Recipe, load_recipe
from autoglm_compress.records.plan import PlanRecord
from autoglm_compress.records.run import RunResult, run_result


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
    """Run a recipe, stage by stage. Stages that an earlier run into the same folder finished are reused.

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
    return run_result(run_recipe(loaded, options, shown_progress(progress)))


def _recipe(recipe: Recipe | Place) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _output(recipe: Recipe, output: Place | None) -> Path:
    return Path("runs") / recipe.name if output is None else Path(output)
