"""Shapes of checkpoints whose sizes a stage has decided in the run, where the plan had guessed them."""

from autoglm_compress.architecture import ModelShape
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.records.stage import Shape
from autoglm_compress.stages import Stage


def decided(planned: ModelShape, made: Shape | None) -> ModelShape:
    """The planned shape of a checkpoint with the sizes that its record has; as it is planned without a record."""
    sizes = {name: getattr(made, name, None) or size for name, size in planned.cut_sizes.items()}
    return planned if sizes == planned.cut_sizes else planned.with_sizes(sizes)


def planned_after(stage: Stage, name: str, before: ModelShape) -> ModelShape:
    """The shape that a stage makes of a decided one.

    Raises:
        UserError: it cannot work on it.
    """
    try:
        return stage.plan(before)
    except PlanError as error:
        raise UserError(
            f"{name}: {error.option}: {error}. The stage before it has decided these sizes in this run: change the "
            "option, or what that stage may decide."
        ) from None
