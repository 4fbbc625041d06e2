"""Checks of the options of healing, before anything runs."""

from importlib.util import find_spec

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.dataset import Dataset
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.healing.optimizer import check_installed
from autoglm_compress.healing.options import HealingOptions


def check_options(options: HealingOptions, shape: ModelShape) -> None:
    """Raise PlanError if a checkpoint of this shape cannot be healed with these options."""
    if shape.quantization is not None and options.lora is not None:
        raise PlanError("lora", "cannot be merged into a quantized checkpoint: heal before quantizing, or leave it out")
    if shape.quantization is not None and options.optimizer == "muon":
        raise PlanError("optimizer", "muon: healing a quantized checkpoint trains only scales and norms: use adamw")
    if isinstance(options.data, Dataset) and options.sequence_length is None:
        raise PlanError("sequence_length", "say how many tokens a row of a dataset has")
    if options.residual and options.teacher_top_k:
        raise PlanError("residual", "needs the teacher in memory: not with teacher_top_k")
    if options.residual and options.teacher:
        raise PlanError("residual", "compares with the run's source: not with another teacher")
    if options.teacher_top_k and options.teacher_top_k >= shape.vocab_size:
        raise PlanError("teacher_top_k", f"{options.teacher_top_k}: the vocabulary has {shape.vocab_size} tokens")
    if options.micro_batch_size and options.micro_batch_size > options.batch_size:
        raise PlanError("micro_batch_size", f"{options.micro_batch_size} is more than batch_size {options.batch_size}")
    if options.lora is not None and find_spec("peft") is None:
        raise PlanError("lora", "peft is not installed: pip install 'autoglm-compress[heal]'")
    try:
        check_installed(options.optimizer)
    except UserError as error:
        raise PlanError("optimizer", str(error)) from None


def check_teacher(shape: ModelShape, teacher: ModelShape) -> None:
    """Raise PlanError if a teacher has another vocabulary."""
    if teacher.vocab_size != shape.vocab_size:
        raise PlanError(
            "teacher",
            f"has a vocabulary of {teacher.vocab_size} tokens, and the checkpoint to heal one of {shape.vocab_size}: "
            "it must be of the same tokenizer",
        )


def check_tokens(options: HealingOptions, calibration_length: int) -> None:
    """Raise PlanError if the tokens do not fill a batch, in rows of the options' length or the calibration's."""
    length = options.sequence_length or calibration_length
    if options.tokens < options.batch_size * length:
        raise PlanError(
            "tokens",
            f"{options.tokens}: a batch has {options.batch_size} rows of {length}: give {options.batch_size * length} "
            "or more, or a smaller batch_size or sequence_length",
        )
