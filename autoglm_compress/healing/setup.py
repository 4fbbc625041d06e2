"""From the options of healing to a trainer: the teacher, the rows of text, and the student."""

from dataclasses import dataclass
from pathlib import Path

import torch

from autoglm_compress.calibration.dataset import Dataset
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.run_text import CalibrationText
from autoglm_compress.calibration.training_rows import (
    TextPart,
    TrainingRows,
    random_rows,
    training_rows,
)
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.errors import UserError
from autoglm_compress.forward.one_layer_model import fast_dtype
from autoglm_compress.forward.whole_model import load_model
from autoglm_compress.healing.dataset_text import dataset_rows
from autoglm_compress.healing.model import Student
from autoglm_compress.healing.options import HealingOptions
from autoglm_compress.healing.sharding import shard
from autoglm_compress.healing.teacher import CachedTeacher, ResidentTeacher, Teacher
from autoglm_compress.healing.teacher_samples import continued
from autoglm_compress.healing.trained_weights import choose_trained
from autoglm_compress.healing.trainer import Trainer
from autoglm_compress.runtime import Runtime


@dataclass(frozen=True)
class HealingInputs:
    """The inputs of healing.

    Attributes:
        origin: the run's source, whose tokenizer reads a dataset.
        source: the checkpoint to heal.
        teacher: the checkpoint whose predictions are the target.
        lineage: which parts of the run's source `source` still has.
        text: the text of the calibration sources.
        seed: decides the order of rows, and random ones.
        work: a folder that survives a kill.
        runtime: where to train, and the processes that share every batch.
    """

    origin: Checkpoint
    source: Checkpoint
    teacher: Checkpoint
    lineage: Lineage
    text: CalibrationText
    seed: int
    work: Path
    runtime: Runtime


def set_up(options: HealingOptions, inputs: HealingInputs) -> Trainer:
    """Load teacher and student and gather the rows to train on.

    Raises:
        UserError: there is too little text, it cannot be read, or a model cannot be loaded.
    """
    runtime = inputs.runtime
    lineage = inputs.lineage if options.residual else None
    top_k = options.teacher_top_k
    resident = None if top_k else ResidentTeacher(inputs.teacher, runtime.device, lineage)
    with runtime.processes.first_goes_first():
        data = training_rows(_rows(options, inputs, resident), inputs.seed)
        teacher: Teacher | None = resident
        if top_k:
            teacher = CachedTeacher(inputs.teacher, data.rows, top_k, inputs.work / "teacher", runtime)
        assert teacher is not None  # it is resident or cached
    _require_batch(options, data)
    student = _student(options, inputs)
    wrapped = shard(student, runtime.device.type, runtime.processes)
    return Trainer(student, wrapped, teacher, data, options, inputs.work / "training", runtime)


def _require_batch(options: HealingOptions, data: TrainingRows) -> None:
    if len(data.order) < options.batch_size:
        raise UserError(
            f"tokens: {options.tokens} fill {len(data.order)} rows of {data.rows.shape[1]}, fewer than the batch_size "
            f"of {options.batch_size}: give more tokens, or a smaller batch_size or sequence_length."
        )


def _student(options: HealingOptions, inputs: HealingInputs) -> Student:
    """The checkpoint to heal, with the trained parameters in fp32."""
    source, device = inputs.source, inputs.runtime.device
    fast = fast_dtype(source, device)
    fast = torch.bfloat16 if fast == torch.float16 else fast  # gradients exceed the range of fp16
    model = load_model(source, device, torch.float32 if options.lora is None else fast, keep_integers=True)
    quantized = source.shape.quantization is not None
    choose_trained(model, source.family.layer_linears, options.lora, quantized, inputs.seed)
    if options.gradient_checkpointing:
        model.train()
        model.get_decoder().gradient_checkpointing_enable({"use_reentrant": False})
    return Student(model, source, lambda: torch.autocast(device.type, fast, enabled=fast != torch.float32))


def _rows(options: HealingOptions, inputs: HealingInputs, resident: ResidentTeacher | None) -> list[TextPart]:
    """The rows to train on, text and random ones."""
    random = round(options.tokens * options.random_tokens)
    parts = _text(options, inputs, resident, options.tokens - random)
    length = parts[0].rows.shape[1]
    if random:
        parts.append(random_rows(max(random // length, 1), length, inputs.teacher.shape.vocab_size, inputs.seed))
    return parts


def _text(
    options: HealingOptions, inputs: HealingInputs, resident: ResidentTeacher | None, tokens: int
) -> list[TextPart]:
    if isinstance(options.data, Dataset):
        assert options.sequence_length is not None  # the plan refuses a dataset without it
        return [_dataset_text(options.data, inputs, tokens, options.sequence_length)]
    parts = inputs.text.training(tokens, options.sequence_length)
    if options.data == "calibration":
        return parts
    runtime = inputs.runtime
    teacher = resident or ResidentTeacher(inputs.teacher, runtime.device, None)
    folder = inputs.work / "written"
    return continued(teacher.model, inputs.teacher.shape, parts, inputs.seed, folder, runtime.progress)


def _dataset_text(dataset: Dataset, inputs: HealingInputs, tokens: int, length: int) -> TextPart:
    wanted, reader = max(tokens // length, 1), Reader(inputs.origin.tokenizer())

    def streamed() -> dict[str, torch.Tensor]:
        part = dataset_rows(dataset, reader, wanted, length)
        return {"rows": part.rows, "deciding": part.deciding}

    # Kept on disk, because a continued run must use the same rows.
    kept = computed_once(inputs.work / "rows.safetensors", streamed)
    return TextPart(kept["rows"], wanted, kept["deciding"])
