"""Questions of a folder as a task of lm-eval."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Value
from lm_eval.api.task import ConfigurableTask

from autoglm_compress.evaluation.questions import Question

FEATURES = Features(
    {"question": Value("string"), "subject": Value("string"), "choices": [Value("string")], "answer": Value("int64")}
)


class FolderTask(ConfigurableTask):
    """An lm-eval task on questions that are in memory already, by split."""

    def __init__(self, questions: dict[str, Dataset], config: dict[str, Any]) -> None:
        self.dataset = questions
        super().__init__(config=config)

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the questions came with the constructor."""


def dataset_of(documents: Sequence[dict[str, Any]], features: Features) -> Dataset:
    """Documents, perhaps none, as a data set."""
    return Dataset.from_dict({name: [document[name] for document in documents] for name in features}, features)


def as_documents(questions: Sequence[Question], subject: str) -> list[dict[str, Any]]:
    """The questions of a subject as lm-eval has those of MMLU."""
    return [
        {"question": one.text, "subject": subject, "choices": list(one.choices), "answer": one.answer}
        for one in questions
    ]
