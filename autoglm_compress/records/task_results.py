"""The results of tasks in files: with the values of every question and row, or as summaries without them."""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_NATS = 500.0
"""Upper limit of a mean over tokens: far above any model's value, while its exponential is still finite."""
RECORDS = "records"
ROWS = "rows"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Scores(_Part):
    """Accuracy, from 0 to 1, on a subject, on a category or in all; `correct` has a 1 or 0 for each question."""

    accuracy: Finite
    stderr: Finite | None = None
    questions: int | None = None
    correct: str = Field(default="", pattern="^[01]*$")


OfSubject = TypeVar("OfSubject", bound=Scores)


class MmluScores(Scores, Generic[OfSubject]):
    """Accuracy in all, by subject and by category."""

    subjects: dict[str, OfSubject] = Field(default_factory=dict)
    categories: dict[str, Scores] = Field(default_factory=dict)


class MmluSummary(MmluScores[Scores]):
    """The result of the task `mmlu` without the questions."""


class Question(_Part):
    """One question: `log_likelihoods` of the answers A to D in nats, and whether the likeliest is right."""

    id: str
    log_likelihoods: Annotated[list[Finite], Field(min_length=4, max_length=4)]
    choice: Literal["A", "B", "C", "D"]
    right: bool


class Subject(Scores):
    """The questions of a subject, its category if it is one of MMLU's, and a hash of the prompts it was asked with."""

    category: str | None
    prompts: str
    records: Annotated[list[Question], Field(min_length=1)]


class Mmlu(MmluScores[Subject]):
    """The result of the task `mmlu`, with every question."""

    num_fewshot: int
    subjects: Annotated[dict[str, Subject], Field(min_length=1)]

    @property
    def every_question(self) -> list[Question]:
        """All questions, subject by subject."""
        return [question for subject in self.subjects.values() for question in subject.records]


class Perplexity(_Part):
    """The result of the task `perplexity`: the mean negative log-likelihood of each row, in nats per token."""

    text: str
    rows: Annotated[list[Annotated[Finite, Field(ge=0, le=MOST_NATS)]], Field(min_length=2)]


Rows = Annotated[list[Finite], Field(min_length=2)]


class AgreementRows(_Part):
    """Of each row of tokens the mean divergence in nats, and the share with the same likeliest next token."""

    divergence: Rows
    top1: Rows


class Agreement(_Part):
    """What `evaluate --against` measured: `text` and `against` are hashes of the tokens and of the other checkpoint.

    Earlier versions wrote neither, and no `rows`.
    """

    divergence: Finite
    top1: Annotated[float, Field(ge=0, le=1)]
    text: str | None = None
    against: str | None = None
    rows: AgreementRows | None = None

    @model_validator(mode="after")
    def _same_rows(self) -> "Agreement":
        if self.rows is not None and len(self.rows.divergence) != len(self.rows.top1):
            raise ValueError("rows.divergence and rows.top1 are not of the same length")
        return self


class Answer(_Part):
    """A generated answer: `where` is the file and line of the row, `question` the text of its last message before."""

    where: str
    question: str
    expected: str
    answer: str
    right: bool


class TaskRecords(_Part):
    """Of a task of lm-eval, or of `generate`: a hash of the documents and prompts and one of all answers, by metric
    whether more is better (absent or None: not known) and, where the metric is a mean over the documents, its value
    for each. Of `generate` every answer too.
    """

    documents: str | None = None
    responses: str | None = None
    higher_is_better: dict[str, bool | None] = Field(default_factory=dict)
    values: dict[str, list[Finite]] = Field(default_factory=dict)
    answers: list[Answer] = Field(default_factory=list)


def without_records(result: dict[str, Any]) -> dict[str, Any]:
    """Results by task, or a part of them, without the record of every question and the value of every row."""
    return {
        name: without_records(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if name not in (RECORDS, ROWS)
    }
