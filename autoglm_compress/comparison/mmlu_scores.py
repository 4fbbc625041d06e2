"""The result of the task `mmlu`, as files have it: with the record of every question, or as a summary without."""

from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Scores(BaseModel):
    """Accuracy, from 0 to 1, on a subject, on a category or in all; `correct` has a 1 or 0 for each question."""

    model_config = ConfigDict(frozen=True, strict=True)

    accuracy: Finite
    stderr: Finite | None = None
    questions: int | None = None
    correct: str = Field(default="", pattern="^[01]*$")


OfSubject = TypeVar("OfSubject", bound=Scores)


class MmluScores(Scores, Generic[OfSubject]):
    """Accuracy in all, by subject and by category."""

    subjects: dict[str, OfSubject] = Field(default_factory=dict)
    categories: dict[str, Scores] = Field(default_factory=dict)
