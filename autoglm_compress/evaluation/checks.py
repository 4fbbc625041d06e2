"""Checks of the rows that evaluations read, before work starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoglm_compress.calibration.answers import exchanges, held_out_answers, predicted
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.text import PYTHON_DOCS, media_chats
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.generate import asked_rows
from autoglm_compress.evaluation.options import EvaluationOptions, PerplexityOptions
from autoglm_compress.evaluation.questions import asking, read_subjects
from autoglm_compress.evaluation.run_results import EvaluationData


@dataclass(frozen=True)
class Names:
    """What the user calls the text for perplexity, and the option to measure it on answers."""

    text: str = "evaluation.perplexity.source"
    answers: str = "evaluation.perplexity.answers: true"


@dataclass(frozen=True)
class RowChecks:
    """Reads all rows that tasks need but text, which has no rows to be bad.

    Without a reader, rows are read and not turned into tokens. `longest` is the most tokens that the model reads, None
    if there is no limit.
    """

    options: EvaluationOptions
    data: EvaluationData
    reader: Reader | None
    longest: int | None
    seed: int
    names: Names = Names()

    def check(self, tasks: Sequence[str]) -> bool:
        """Whether some rows that are scored a layer at a time have images or sounds, which towers see or hear first.

        Raises:
            UserError: a row cannot be read, is too long, or has no answer; or the text is not what perplexity reads.
        """
        shown = "perplexity" in tasks and self._check_text(self.options.perplexity)
        if "mmlu" in tasks and self.data.questions is not None:
            shown |= self._check_questions(self.data.questions)
        if "generate" in tasks and self.data.generate is not None:
            self._check_generated(self.data.generate)
        return shown

    def _check_text(self, options: PerplexityOptions) -> bool:
        path, names = self.data.text, self.names
        if not options.answers:
            require_text(path, names)
            return False
        if path is None or path.suffix != ".jsonl":
            raise UserError(
                f"{names.answers}: {path or PYTHON_DOCS}: no rows with answers there: give a .jsonl file of chats "
                f"({names.text})."
            )
        rows = held_out_answers(path, options.samples, self.seed)
        if self.reader is not None:
            for row in rows:
                predicted(self.reader, row, self.longest)
        return any(row.prompt.media for row in rows)

    def _check_questions(self, folder: Path) -> bool:
        shown = False
        for subject in read_subjects(folder, self.options.mmlu.num_fewshot, self.options.mmlu.subjects):
            shown |= subject.shows
            if subject.shows and self.reader is not None:
                for question in (*subject.examples, *subject.questions):
                    self.reader.ids(asking(subject, question))
        return shown

    def _check_generated(self, path: Path) -> None:
        if self.reader is None:
            list(exchanges(path))
        else:
            asked_rows(path, self.options.generate, self.reader, self.longest)


def require_text(path: Path | None, names: Names) -> None:
    """Raise UserError if a text has rows with images or sounds: no whole text can be predicted there."""
    if path is not None and media_chats(path):
        raise UserError(
            f"{names.text}: {path}: has rows with images or sounds, whose answers alone can be predicted: give "
            f"{names.answers}, or name a source of text, such as {PYTHON_DOCS}."
        )
