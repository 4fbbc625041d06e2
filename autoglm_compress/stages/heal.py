"""Heal by distillation: train the compressed model to predict what the original predicts."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.dataset import Dataset
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.errors import UserError
from autoglm_compress.figures import Record
from autoglm_compress.healing.checks import check_options, check_teacher, check_tokens
from autoglm_compress.healing.costs import healing_memory, healing_scratch
from autoglm_compress.healing.optimizer import EIGHT_BIT
from autoglm_compress.healing.options import HealingOptions
from autoglm_compress.healing.setup import HealingInputs, set_up
from autoglm_compress.healing.sharding import require_equal_parts
from autoglm_compress.healing.trained_weights import healed
from autoglm_compress.healing.trainer import Trainer
from autoglm_compress.processes import Processes
from autoglm_compress.stages.base import SharedContext, Stage, StageContext
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.heal import heal_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Heal(Stage, HealingOptions):
    """Train the checkpoint to give the next-token distributions of the run's source, or of another `teacher`.

    The loss is KL(teacher || student), averaged over `tokens` tokens of the calibration sources, of what the teacher
    writes from their openings on (`teacher_samples`), or of a dataset. `cross_entropy` is the share of the text's own
    next tokens in it, and `residual` the weight of the residual stream's relative error. `random_tokens` is the share
    of rows that are no text, but tokens of the whole vocabulary: so healing also covers tokens that the text does not
    contain. All weights are trained, or low-rank adapters with `lora`; in a quantized checkpoint norms, biases and
    scales are trained, and the integers stay. `teacher_top_k` keeps that many of the teacher's likeliest tokens on
    disk, made a layer at a time, so that the teacher is not in memory. The weights of the best of `checks`, on text
    that no stage of the run is fitted to, are kept. If no check is better than the start, the start's weights stay.
    """

    stage: Literal["heal"]

    revision: ClassVar[int] = 2
    reads_quantized: ClassVar[bool] = True

    @property
    def runs_in_all_processes(self) -> bool:
        """They share every batch."""
        return True

    @property
    def uses_calibration(self) -> bool:
        """Whether the text is that of the calibration sources, or goes on from it."""
        return not isinstance(self.data, Dataset)

    @property
    def trains_on_calibration(self) -> bool:
        """Whether the text is that of the calibration sources, or goes on from it."""
        return self.uses_calibration

    @property
    def other_checkpoints(self) -> dict[str, str]:
        """The teacher, if it is not the run's source."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    def plan(self, shape: ModelShape) -> ModelShape:
        """The same shape."""
        check_options(self, shape)
        return shape

    def check_other(self, shape: ModelShape, other: ModelShape) -> None:
        """A teacher has the same vocabulary."""
        check_teacher(shape, other)

    def check_calibration(self, calibration: CalibrationOptions) -> None:
        """The tokens fill a batch, in rows of the stage's length or the calibration's."""
        check_tokens(self, calibration.sequence_length)

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """Both models, what training adds to one of them, and its state on disk."""
        return Needs(
            memory=healing_memory(self, shape, source, self.sequence_length or calibration.sequence_length),
            scratch=healing_scratch(self, shape, source),
        )

    def check_processes(self, processes: Processes) -> None:
        """They share a batch in equal parts."""
        require_equal_parts(self.batch_size, processes)
        if self.optimizer in EIGHT_BIT and processes.count > 1:
            raise UserError(f"optimizer: {self.optimizer} cannot be spread over processes: use adamw.")

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """The loss while training, and the checks."""
        return heal_plot(record)

    def run(self, context: StageContext) -> None:
        """Train, and write the best weights."""
        source, trainer = context.source, self._train(context)
        decisions, trained, checks, best = _decisions(trainer), trainer.trained(), trainer.checks, trainer.best_check
        del trainer  # the models, and what the optimizer keeps
        family, layers = source.family, range(source.shape.num_hidden_layers)
        units = [[family.embedding], *([] for _ in layers), []]
        for name, _ in source.shape.tensors():
            if name != family.embedding:
                layer = family.place(name).layer
                units[-1 if layer is None else 1 + layer].append(name)
        for number, names in enumerate(units):
            context.target.write(number, healed(names, source, trained, self.lora))
        context.target.finish(source.config, like=source)
        context.decisions |= decisions
        if not best.step:
            first, *others = (check.divergence for check in checks)
            context.ends_where_it_began(
                f"no check was better than the start, {first:.4g} nats from the teacher on text that decides; the best "
                f"of {len(others)} had {min(others):.4g}"
            )

    def follow(self, context: SharedContext) -> None:
        """Train, and leave the writing to the first process."""
        self._train(context)

    def _train(self, context: SharedContext) -> Trainer:
        try:
            trainer = set_up(self, self._inputs(context))
            trainer.run()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"healing does not fit into the GPU's memory: {str(error).splitlines()[0]} Give a "
                "micro_batch_size of 1, gradient_checkpointing: true, a teacher_top_k, or lora."
            ) from None
        return trainer

    def _inputs(self, context: SharedContext) -> HealingInputs:
        teacher = context.origin if self.teacher is None else context.open_checkpoint(self.teacher, "teacher")
        return HealingInputs(
            origin=context.origin,
            source=context.source,
            teacher=teacher,
            lineage=context.lineage,
            text=context.text,
            seed=context.seed,
            work=context.work,
            runtime=context.runtime,
        )


def _decisions(trainer: Trainer) -> dict[str, Any]:
    """What goes on record of training."""
    return {
        "steps": trainer.step,
        "passes": round(trainer.data.passes, 3),
        "stopped": trainer.stopped,
        "kept": asdict(trainer.best_check),
        "checks": [asdict(check) for check in trainer.checks],
        "curve": [asdict(point) for point in trainer.curve],
    }
