"""Planning and running recipes."""

from pathlib import Path
from typing import Annotated

from autoglm_compress.api.arguments import Device, Place, shown_progress
from autoglm_compress.checked import checked
from autoglm_compress.memory_limit import limit_in_bytes
from autoglm_compress.pipeline import RunOptions, plan_recipe, run_recipe, with_texts
from autoglm_compress.pipeline.run_folder import RunFolder
from autoglm_compress.recipe import Recipe, load_recipe
from autoglm_compress.records.plan import PlanRecord
from autoglm_compress.records.run import RunResult, run_result

AnyRecipe = Annotated[Recipe | Place, "what load_recipe gave, the name of a recipe or the path of a file"]


@checked
def plan(recipe: AnyRecipe, output: Place | None = None, *, memory_limit: str | int | None = None) -> PlanRecord:
    """Plan a recipe, reading no weights: shapes, sizes, memory, disk, warnings.

    Args:
        recipe: what `load_recipe` gave, or what it takes.
        output: the folder that a run would write to; the disk it is on counts. `runs/NAME` by default.
        memory_limit: a size such as `8GB`, or bytes: stages that may need more are refused.

    Raises:
        UserError: an argument is of a wrong type, the recipe, its source, a text or the folder cannot be used, or the
            limit is too low.
    """
    limit, loaded = limit_in_bytes(memory_limit), _recipe(recipe)
    folder = RunFolder(_output(loaded, output), loaded.name)  # refuses what a run would refuse
    planned = plan_recipe(loaded, folder.path)
    planned = with_texts(planned, planned.folder)
    if limit is not None:
        planned.require_memory(limit, range(len(loaded.stages)))
    return planned.record()


@checked
def run(
    recipe: AnyRecipe,
    output: Place | None = None,
    *,
    device: Device = "auto",
    first: str | None = None,
    last: str | None = None,
    fresh: bool = False,
    memory_limit: str | int | None = None,
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
        memory_limit: a size such as `8GB`, or bytes: stages that may need more are refused.
        progress: whether to print how it goes.

    Raises:
        UserError: an argument is of a wrong type, or something that the recipe names, the folder or the disk does not
            allow it.
    """
    loaded = _recipe(recipe)
    options = RunOptions(_output(loaded, output), device, first, last, fresh, limit_in_bytes(memory_limit))
    return run_result(run_recipe(loaded, options, shown_progress(progress)))


def _recipe(recipe: Recipe | Place) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _output(recipe: Recipe, output: Place | None) -> Path:
    return Path("runs") / recipe.name if output is None else Path(output)
