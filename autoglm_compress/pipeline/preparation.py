"""Before a run: hash the inputs, find the stages to run, and refuse what cannot work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoglm_compress.errors import UserError
from autoglm_compress.pipeline.inputs import RunInputs
from autoglm_compress.pipeline.keys import Keys, KnownCheckpoint, keys_of
from autoglm_compress.pipeline.retention import most_bytes
from autoglm_compress.pipeline.schedule import Schedule
from autoglm_compress.records.files import SOURCE_FOLDER_NAME
from autoglm_compress.report.numbers import size
from autoglm_compress.stages import Makes
from autoglm_compress.versions import made_elsewhere


@dataclass(frozen=True)
class Preparation:
    """The preparation of a run, before it begins."""

    inputs: RunInputs
    keys: Keys
    schedule: Schedule

    def checkpoint(self, number: int | None) -> KnownCheckpoint:
        """The checkpoint of stage `number`, or the source for None."""
        return _checkpoint(self.inputs, self.keys, number)


def prepare(inputs: RunInputs) -> Preparation:
    """Hash everything a run depends on, find the stages to run, refuse what cannot work, and announce the rest.

    Deletes earlier results under `--fresh`, and renames finished stages to their present names in the recipe.

    Raises:
        UserError: the run cannot be done.
    """
    options, folder = inputs.options, inputs.folder
    keys = keys_of(inputs)
    left_over = [] if options.fresh else folder.adopt(inputs.names, keys.stages)
    again = inputs.chosen if options.fresh or options.first is not None else ()

    def known(number: int | None, tasks: Sequence[str]) -> bool:
        checkpoint = _checkpoint(inputs, keys, number)
        return inputs.evaluations.has(checkpoint.name, checkpoint.key, tasks)

    schedule = Schedule(inputs.recipe, folder, keys.stages, known, again, inputs.chosen[-1])
    _check_processes(inputs, schedule)
    if options.memory_limit is not None:
        inputs.plan.require_memory(options.memory_limit, schedule.to_make)
    if options.fresh:
        folder.clear()
    _announce(inputs, keys, schedule, left_over)
    _check_disk(inputs, schedule)
    _forget_evaluations(inputs, keys)
    return Preparation(inputs, keys, schedule)


def _checkpoint(inputs: RunInputs, keys: Keys, number: int | None) -> KnownCheckpoint:
    if number is None:
        return KnownCheckpoint(SOURCE_FOLDER_NAME, keys.source, inputs.source.folder)
    name = inputs.recipe.folder_name(number)
    return KnownCheckpoint(name, keys.stages[number], inputs.folder.path / name)


def _check_processes(inputs: RunInputs, schedule: Schedule) -> None:
    """Raise UserError if so many processes cannot run these stages."""
    processes = inputs.runtime.processes
    to_make = [inputs.recipe.stages[number] for number in schedule.to_make]
    if any(stage.uses_calibration or stage.makes_quantized for stage in to_make):
        # Too little text is said before work starts, and before anything is deleted.
        processes.require_rows(sum(map(len, inputs.text.batches)))
    for stage in to_make:
        stage.check_processes(processes)


def _announce(inputs: RunInputs, keys: Keys, schedule: Schedule, left_over: Sequence[Path]) -> None:
    """Print which stages are reused, which run again and why, and which folders the recipe no longer names."""
    note, first = inputs.runtime.progress.note, inputs.options.first
    before = {entry.name: entry for entry in inputs.folder.manifest.stages}
    for number in range(inputs.chosen[-1] + 1):
        name, key, stage = inputs.names[number], keys.stages[number], inputs.recipe.stages[number]
        finished = schedule.on_record(number)
        forced = first is not None and number >= inputs.chosen[0]
        if finished and not forced and number in schedule.to_make:
            note(f"{name}: finished before, but not kept: done again for those that need it")
        elif finished and not forced:
            note(f"{name}: finished before, reused{made_elsewhere(finished.versions, stage.label)}")
        elif number < inputs.chosen[0] and stage.makes is Makes.CHECKPOINT:
            raise UserError(f"--from {first}: {name} is not finished yet. Run without --from, or from it.")
        elif forced:
            note(f"{name}: done again (--from {first})")
        elif name in before and before[name].key != key:
            note(f"{name}: its options, or what it depends on, changed: done again")
        elif name in before and before[name].finished:
            note(f"{name}: missing or damaged files: done again")
    for folder in left_over:
        note(f"{folder.name}: not in the recipe (any more); delete it if you do not need it")
    for warning in [*inputs.plan.stage_warnings(), *inputs.plan.text_warnings]:
        note(f"warning: {warning}")


def _forget_evaluations(inputs: RunInputs, keys: Keys) -> None:
    """Drop the evaluations of the stages that `--from` repeats. `--fresh` has dropped all already."""
    for number in inputs.chosen if inputs.options.first is not None else ():
        if tasks := inputs.recipe.stages[number].evaluates:
            inputs.evaluations.forget(_checkpoint(inputs, keys, inputs.recipe.parents[number]).name, tasks)


def _check_disk(inputs: RunInputs, schedule: Schedule) -> None:
    """Raise UserError if the disk is too small for the stages to run."""
    recipe, plan, to_make = inputs.recipe, inputs.plan, schedule.to_make
    sizes = [entry.disk for entry in plan.checkpoints[1:]]
    needed = most_bytes(recipe, sizes, to_make, schedule.with_weights())
    needed += plan.scratch_bytes if to_make else 0
    if needed > plan.free_bytes:
        hint = ", or keep fewer checkpoints with --set keep=none" if recipe.keep != "none" else ""
        raise UserError(
            f"{inputs.folder.path}: the run needs {size(needed)} of disk and {size(plan.free_bytes)} are "
            f"free. Free some, or give a folder on another disk with --output{hint}."
        )
