"""The options of healing in a recipe."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from autoglm_compress.calibration.dataset import Dataset

COUNT = re.compile(r"(\d+(?:\.\d+)?)([kMG])")
TIMES = {"k": 10**3, "M": 10**6, "G": 10**9}

Positive = Annotated[int, Field(strict=True, gt=0)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _count(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (found := COUNT.fullmatch(value)) and float(found[1]) > 0:
        return round(float(found[1]) * TIMES[found[2]])
    raise ValueError("expected a positive whole number, or one such as 500k, 2M or 1.5G")


class Lora(BaseModel):
    """Low-rank adapters on all linears of the layers (Hu et al. 2021), merged into the weights in the end.

    Everything else is frozen. `alpha` over `rank` scales their output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Positive = 64
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 64.0


class HealingOptions(BaseModel):
    """The options of healing.

    Defaults are those of Minitron's recipe (Muralidharan et al. 2024: forward KL alone, AdamW with betas 0.9 and 0.95,
    cosine to a tenth), except for the learning rate: their 1e-4 is for billions of tokens, and few tokens need a higher
    one.
    """

    tokens: Annotated[int, PlainValidator(_count)]
    data: Literal["calibration", "teacher_samples"] | Dataset = "calibration"
    sequence_length: Annotated[int, Field(strict=True, gt=1)] | None = None
    batch_size: Positive = 8
    micro_batch_size: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-4
    final_learning_rate: Share = 0.1
    warmup: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    optimizer: Literal["adamw", "muon", "adamw8bit", "paged_adamw8bit"] = "adamw"
    cross_entropy: Share = 0.0
    residual: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    random_tokens: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    teacher: str | None = None
    teacher_top_k: Positive | None = None
    lora: Lora | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    gradient_checkpointing: bool = False
    checks: Positive = 10
