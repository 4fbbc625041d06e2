"""Running a recipe, in one process or in several that were launched together."""

from pathlib import Path

from rich.console import Console

from autoglm_compress.errors import UserError
from autoglm_compress.pipeline.inputs import RunOptions, find_inputs
from autoglm_compress.pipeline.run_folder import disk_problem
from autoglm_compress.pipeline.runner import follow, run_stages
from autoglm_compress.processes import choose_device, join_processes
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import Recipe
from autoglm_compress.runtime import Runtime


def run_recipe(recipe: Recipe, options: RunOptions, progress: Progress) -> Path:
    """Run a recipe and return the folder of its results.

    Raises:
        UserError: the recipe, the source, the output folder or the disk does not allow the run, or another process of
            the run failed. No file is half-written.
    """
    processes, device = join_processes(choose_device(options.device))
    shown = progress if processes.is_first else Progress(Console(quiet=True))
    try:
        inputs = find_inputs(recipe, options, Runtime(device, shown, processes))
        if processes.is_first:
            run_stages(inputs)
            processes.tell(None)
        else:
            follow(inputs)
    except OSError as error:
        if problem := disk_problem(options.output, error):
            raise UserError(problem) from None
        raise
    return inputs.folder.path
