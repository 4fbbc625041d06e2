"""Choose how few of the cached tokens attention reads, and write that beside the checkpoint."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from autoglm_compress.architecture import ModelShape
from autoglm_compress.attention.settings import ATTENTION, FIRST, AttentionOptions, SparseAttention
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint.writer import share_files
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.evaluation.agreement import Agreement, agreement
from autoglm_compress.figures import Record
from autoglm_compress.fitting.tokens_read import attending, choose_tokens_read, reading_memory, tuning_rows
from autoglm_compress.stages.base import Stage, StageContext
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.attention import attention_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Attention(Stage, AttentionOptions):
    """Let steps of decoding read few of the cached tokens, chosen anew at each step, and keep the cache in INT8.

    The weights stay. The choice is written as `attention.json` beside them, which `transformers` uses through
    `autoglm_compress.attention`, and which engines do not look at. Layers read `top_k` tokens, or 2, 4 or 8 times as
    many, or all, as it takes for the mean KL divergence from dense attention on calibration text to stay within
    `max_divergence` nats, with every token decoded so and none dense. Text that was not looked at must agree.
    """

    stage: Literal["attention"]
    top_k: int = Field(default=64, ge=1, strict=True)
    max_divergence: float = Field(default=0.05, gt=0, allow_inf_nan=False)

    reads_quantized = True
    compares_held_out = True
    sidecar = ATTENTION

    @property
    def uses_calibration(self) -> bool:
        """Always."""
        return True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The same shape."""
        return shape

    def check_calibration(self, calibration: CalibrationOptions) -> None:
        """Rows must be longer than what is read of them."""
        read = self.top_k + self.window + FIRST
        if calibration.sequence_length <= read:
            raise PlanError(
                "top_k",
                f"rows of {calibration.sequence_length} tokens are read whole with {read} tokens to read: raise "
                "calibration.sequence_length, or read fewer",
            )

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """Walks over few rows, and scores."""
        return Needs(memory=reading_memory(shape, calibration.sequence_length))

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """Tokens by layers."""
        return attention_plot(record)

    def run(self, context: StageContext) -> None:
        """Choose, see whether other text agrees, and write the file beside the same weights."""
        source, runtime = context.source, context.runtime.alone()
        rows = tuning_rows(context.text.batches)
        chosen = choose_tokens_read(source, self, self.top_k, self.max_divergence, rows, runtime)
        everywhere = chosen.model_copy(update={"dense_below": 0})
        found = agreement(source, attending(source, everywhere), context.text.held_out(), runtime)
        self._require(found)
        measured = {
            "kl_divergence": float(f"{found.divergence:.4g}"),
            "same_next_token": float(f"{found.top1:.4g}"),
            "held_out_tokens": found.tokens,
            "sequence_length": rows.shape[1],
        }
        share_files(source, context.result, linked=context.made_by_the_run)
        SparseAttention(**(chosen.model_dump() | {"measured": measured})).save(context.result / ATTENTION)
        context.decisions = {"top_k": list(chosen.top_k), "agreement": measured}

    def _require(self, found: Agreement) -> None:
        """Raise UserError if text that was not looked at does not agree."""
        if not found.divergence <= self.max_divergence:
            raise UserError(
                f"stage {self.label}: sparse attention does not predict what dense attention does: mean KL divergence "
                f"{found.divergence:.3g} nats over {found.tokens} held-out tokens (at most {self.max_divergence:g} is "
                "allowed). Raise top_k, calibration.samples or max_divergence."
            )
