"""Heal by distillation: train the compressed model to predict what the original predicts."""

from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.calibration.training_rows import TextPart, random_rows, training_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.figures import Record
from autoglm_compress.forward.one_layer_model import fast_dtype
from autoglm_compress.forward.whole_model import load_model
from autoglm_compress.healing.costs import healing_memory, healing_scratch
from autoglm_compress.healing.dataset_text import dataset_rows
from autoglm_compress.healing.model import Student
from autoglm_compress.healing.optimizer import EIGHT_BIT, check_installed
from autoglm_compress.healing.options import Dataset, HealingOptions
from autoglm_compress.healing.sharding import require_equal_parts, shard
from autoglm_compress.healing.teacher import CachedTeacher, ResidentTeacher, Teacher
from autoglm_compress.healing.teacher_samples import continued
from autoglm_compress.healing.trained_weights import choose_trained, healed
from autoglm_compress.healing.trainer import Trainer
from autoglm_compress.processes import Processes
from autoglm_compress.stages.base import Stage, StageContext
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.heal import heal_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Heal(Stage, HealingOptions):
    """Train the checkpoint to give the next-token distributions of the run's source, or of another `teacher`.

    The loss is KL(teacher || student), averaged over `tokens` tokens of the calibration sources, of what the teacher
    writes from their openings on (`teacher_samples`), or of a dataset. `cross_entropy` is the share of the text's own
    next tokens in it, and `residual` the weight of the residual stream's relative error. `random_tokens` is the share
    of rows that are no text, but tokens of the whole vocabulary: so healing reaches what the model knows of those that
    the text does not have. All weights are trained, or low-rank adapters with `lora`; of a quantized checkpoint norms,
    biases and scales, and its integers stay.
    `teacher_top_k` keeps that many of the teacher's likeliest tokens on disk, made a layer at a time, so that the
    teacher is not in memory. The weights of the best of `checks`, on text that no stage of the run is fitted to, are
    kept, the start's if none is better.
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
        if shape.quantization is not None and self.lora is not None:
            raise PlanError(
                "lora", "cannot be merged into a quantized checkpoint: heal before quantizing, or leave it out"
            )
        if shape.quantization is not None and self.optimizer == "muon":
            raise PlanError("optimizer", "muon: of a quantized checkpoint scales and norms are trained: use adamw")
        if isinstance(self.data, Dataset) and self.sequence_length is None:
            raise PlanError("sequence_length", "say how many tokens a row of a dataset has")
        if self.residual and self.teacher_top_k:
            raise PlanError("residual", "needs the teacher in memory: not with teacher_top_k")
        if self.residual and self.teacher:
            raise PlanError("residual", "compares with the run's source: not with another teacher")
        if self.teacher_top_k and self.teacher_top_k >= shape.vocab_size:
            raise PlanError("teacher_top_k", f"{self.teacher_top_k}: the vocabulary has {shape.vocab_size} tokens")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise PlanError("micro_batch_size", f"{self.micro_batch_size} is more than batch_size {self.batch_size}")
        if self.lora is not None and find_spec("peft") is None:
            raise PlanError("lora", "peft is not installed: pip install 'autoglm-compress[heal]'")
        try:
            check_installed(self.optimizer)
        except UserError as error:
            raise PlanError("optimizer", str(error)) from None
        return shape

    def check_other(self, shape: ModelShape, other: ModelShape) -> None:
        """A teacher has the same vocabulary."""
        if other.vocab_size != shape.vocab_size:
            raise PlanError(
                "teacher",
                f"has a vocabulary of {other.vocab_size} tokens, and the checkpoint to heal one of {shape.vocab_size}: "
                "it must be of the same tokenizer",
            )

    def check_calibration(self, calibration: CalibrationOptions) -> None:
        """The tokens fill a batch, in rows of the stage's length or the calibration's."""
        length = self.sequence_length or calibration.sequence_length
        if self.tokens < self.batch_size * length:
            raise PlanError(
                "tokens",
                f"{self.tokens}: a batch has {self.batch_size} rows of {length}: give {self.batch_size * length} or "
                "more, or a smaller batch_size or sequence_length",
            )

    def needs(self, shape: ModelShape, source: ModelShape, tokens: int) -> Needs:
        """Both models, what training adds to one of them, and its state on disk."""
        return Needs(
            whole_models=healing_memory(self, shape, source),
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
        source = context.source
        try:
            trainer = self._trainer(context)
            trainer.run()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"healing does not fit into the GPU's memory: {str(error).splitlines()[0]} Give a "
                "micro_batch_size of 1, gradient_checkpointing: true, a teacher_top_k, or lora."
            ) from None
        if context.target is None:
            return
        trained = trainer.trained()
        family, layers = source.family, range(source.shape.num_hidden_layers)
        units = [[family.embedding], *([] for _ in layers), []]
        for name, _ in source.shape.tensors():
            if name != family.embedding:
                units[1 + int(name.split(".")[2]) if name.startswith("model.layers.") else -1].append(name)
        for number, names in enumerate(units):
            context.target.write(number, healed(names, source, trained, self.lora))
        context.target.finish(source.config, like=source)
        context.decisions |= {
            "steps": trainer.step,
            "passes": round(trainer.data.passes, 3),
            "stopped": trainer.stopped,
            "kept": asdict(trainer.best_check),
            "checks": [asdict(check) for check in trainer.checks],
            "curve": [asdict(point) for point in trainer.curve],
        }
        if not trainer.best_check.step:
            first, *others = (check.divergence for check in trainer.checks)
            context.ends_where_it_began(
                f"no check was better than the start, {first:.4g} nats from the teacher on text that decides; the best "
                f"of {len(others)} had {min(others):.4g}"
            )

    def _trainer(self, context: StageContext) -> Trainer:
        source, runtime = context.source, context.runtime
        device = runtime.device
        original = self._teacher_checkpoint(context)
        lineage = context.lineage if self.residual else None
        resident = None if self.teacher_top_k else ResidentTeacher(original, device, lineage)
        with runtime.processes.first_goes_first():
            data = training_rows(self._rows(context, original, resident), context.seed)
            teacher: Teacher = resident or CachedTeacher(
                original, data.rows.long(), self.teacher_top_k, context.work / "teacher", runtime
            )
        if len(data.order) < self.batch_size:
            raise UserError(
                f"tokens: {self.tokens} fill {len(data.order)} rows of {data.rows.shape[1]}, fewer than the batch_size "
                f"of {self.batch_size}: give more tokens, or a smaller batch_size or sequence_length."
            )
        fast = fast_dtype(source, device)
        fast = torch.bfloat16 if fast == torch.float16 else fast  # gradients leave the range of fp16
        model = load_model(source, device, torch.float32 if self.lora is None else fast, keep_integers=True)
        quantized = source.shape.quantization is not None
        choose_trained(model, source.family.layer_linears, self.lora, quantized, context.seed)
        if self.gradient_checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        student = Student(model, lambda: torch.autocast(device.type, fast, enabled=fast != torch.float32))
        wrapped = shard(student, device.type, runtime.processes)
        work = context.work / "training"
        return Trainer(student, wrapped, teacher, data, self, work, runtime)

    def _teacher_checkpoint(self, context: StageContext) -> Checkpoint:
        return context.origin if self.teacher is None else context.open_checkpoint(self.teacher, "teacher")

    def _rows(self, context: StageContext, original: Checkpoint, resident: ResidentTeacher | None) -> list[TextPart]:
        """The rows to train on, text and random ones."""
        random = round(self.tokens * self.random_tokens)
        parts = self._text(context, original, resident, self.tokens - random)
        length = parts[0].rows.shape[1]
        if random:
            parts.append(random_rows(max(random // length, 1), length, original.shape.vocab_size, context.seed))
        return parts

    def _text(
        self, context: StageContext, original: Checkpoint, resident: ResidentTeacher | None, tokens: int
    ) -> list[TextPart]:
        if isinstance(self.data, Dataset):
            wanted = max(tokens // self.sequence_length, 1)
            tokenizer = context.origin.tokenizer()

            def streamed() -> dict[str, torch.Tensor]:
                part = dataset_rows(self.data, tokenizer, wanted, self.sequence_length)
                return {"rows": part.rows, "deciding": part.deciding}

            # Kept, since a run that goes on must not find other rows.
            kept = computed_once(context.work / "rows.safetensors", streamed)
            return [TextPart(kept["rows"], wanted, kept["deciding"])]
        parts = context.text.training(tokens, self.sequence_length)
        if self.data == "calibration":
            return parts
        teacher = resident or ResidentTeacher(original, context.runtime.device, None)
        folder = context.work / "written"
        return continued(teacher.model, original.shape, parts, context.seed, folder, context.runtime.progress)
