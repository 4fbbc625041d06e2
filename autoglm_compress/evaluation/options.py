"""The settings of evaluations, as recipes and the command line give them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Ignored = Literal["case", "space"]


class PerplexityOptions(BaseModel):
    """The text perplexity is measured on.

    `source` is a text source as in the calibration; its held-out split is used. None is the calibration's first source.
    With `answers`, it is a file of chats, `samples` of them are rows, and the last message of each is predicted, from
    what stands before it; `sequence_length` says nothing then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = None
    samples: int = Field(default=64, gt=0)
    sequence_length: int = Field(default=512, gt=1)
    answers: bool = False


class MmluOptions(BaseModel):
    """The MMLU questions: a folder of CSV files (None: from the hub), which subjects, and how many of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = None
    subjects: tuple[str, ...] | None = Field(default=None, min_length=1)
    num_fewshot: int = Field(default=5, ge=0)
    limit: int | None = Field(default=None, gt=0)


class GenerateOptions(BaseModel):
    """The rows that answers are generated for: a .jsonl file of chats whose last message is the right answer.

    An answer is right if it is the same text, but for white space around it. `ignore` leaves more out of the
    comparison: `case`, and all white space with `space`. `limit` rows are chosen at random, the same ones every time.
    `max_new_tokens` is by default a few more than the longest right answer has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = None
    limit: int | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)
    ignore: tuple[Ignored, ...] = ()


class EvaluationOptions(BaseModel):
    """The tasks after every stage, and the settings of all evaluations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_stage: tuple[str, ...] = ()
    perplexity: PerplexityOptions = PerplexityOptions()
    mmlu: MmluOptions = MmluOptions()
    generate: GenerateOptions = GenerateOptions()
