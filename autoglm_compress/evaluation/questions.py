"""Multiple-choice questions from a folder of CSV files, some of which show images or play sounds.

A folder has the layout of the original MMLU archive: `test/<subject>_test.csv` and `dev/<subject>_dev.csv` (or just
`<subject>.csv`), six fields a row: question, A, B, C, D, letter of the answer. Any subjects will do. A file has no
header, or one that names these columns, and perhaps `image` and `audio` too: files, relative to the CSV file.
"""

import csv
import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from autoglm_compress.calibration.chat import MEDIA, Chat, require_file
from autoglm_compress.errors import UserError

LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")


@dataclass(frozen=True)
class Question:
    """A question, its four choices, the number of the right one, and the images and sounds that belong to it.

    `where` is the file and line; `media` has the type and the file of each image or sound.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    where: str
    media: tuple[tuple[str, Path], ...] = ()


@dataclass(frozen=True)
class Subject:
    """The questions of a subject, and the worked examples before each, within a folder.

    `shows` tells whether a file of it has a column for images or sounds.
    """

    name: str
    folder: Path
    questions: tuple[Question, ...]
    examples: tuple[Question, ...]
    shows: bool

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The images and sounds of all questions and examples, each once."""
        return tuple(dict.fromkeys(file for one in (*self.examples, *self.questions) for _, file in one.media))


def read_subjects(folder: Path, num_fewshot: int, subjects: Sequence[str] | None = None) -> list[Subject]:
    """The subjects of a folder.

    Args:
        folder: as described above.
        num_fewshot: worked examples before each question: the first ones of the subject's dev split.
        subjects: those to read; None for all there are.

    Raises:
        UserError: the folder or a file in it is not as described above, or has not all the subjects.
    """
    tests = _files(folder, "test")
    if subjects is not None:
        check_subjects(subjects, tests, str(folder / "test"))
        tests = {subject: path for subject, path in tests.items() if subject in subjects}
    examples = _files(folder, "dev") if num_fewshot > 0 else {}
    missing = sorted(set(tests) - set(examples)) if num_fewshot > 0 else []
    if missing:
        raise UserError(
            f"{folder / 'dev'}: no {missing[0]}_dev.csv; num_fewshot asks for {num_fewshot} worked examples. "
            "Add the file, or set num_fewshot to 0."
        )
    found = []
    for name, path in tests.items():
        asked = _read(path, folder)
        shown = _read(examples[name], folder) if num_fewshot > 0 else _File((), False)
        if len(shown.questions) < num_fewshot:
            raise UserError(
                f"{examples[name]}: {len(shown.questions)} examples, but num_fewshot is {num_fewshot}. "
                "Add examples or lower num_fewshot."
            )
        found.append(Subject(name, folder, asked.questions, shown.questions, asked.shows or shown.shows))
    return found


def files_shown(folder: Path) -> list[Path]:
    """The images and sounds that the files of a folder name, each once.

    Raises:
        UserError: a file with a column for them is not as described above.
    """
    found = [_read(path, folder) for path in sorted(folder.rglob("*.csv")) if _has_header(path)]
    return list(dict.fromkeys(file for read in found for one in read.questions for _, file in one.media))


def _has_header(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        return _is_header(next(csv.reader(stream), []))


def _is_header(fields: Sequence[str]) -> bool:
    return set(COLUMNS) <= set(map(str.strip, fields))


def check_subjects(subjects: Sequence[str], known: Collection[str], where: str) -> None:
    """Raise UserError if a subject is not known."""
    for subject in subjects:
        if subject not in known:
            near = difflib.get_close_matches(subject, known, n=3) or sorted(known)[:3]
            raise UserError(
                f"subjects: no subject {subject!r} among the {len(known)} of {where}. Did you mean {' or '.join(near)}?"
            )


def asking(subject: Subject, question: Question) -> Chat:
    """The chat in which a question is asked without examples."""
    parts = [{"type": kind, "path": str(file.relative_to(subject.folder))} for kind, file in question.media]
    content = [*parts, {"type": "text", "text": question.text}]
    return Chat([{"role": "user", "content": content}], None, question.where, subject.folder, asks=True)


def _files(folder: Path, split: str) -> dict[str, Path]:
    """The CSV file of each subject in one split."""
    files: dict[str, Path] = {}
    for path in sorted((folder / split).glob("*.csv")):
        subject = path.stem.removesuffix(f"_{split}")
        if subject in files:
            raise UserError(
                f"{path}: a second file of the subject {subject}, beside {files[subject].name}. Remove one."
            )
        files[subject] = path
    if not files:
        raise UserError(
            f"{folder / split}: no such folder, or no CSV files in it. "
            f"MMLU needs {split}/<subject>_{split}.csv files in the layout of the MMLU archive."
        )
    return files


@dataclass(frozen=True)
class _File:
    """The questions of a file, and whether it has a column for images or sounds."""

    questions: tuple[Question, ...]
    shows: bool


def _read(path: Path, folder: Path) -> _File:
    """A CSV file, whose images and sounds are within a folder."""
    rows, columns = [], COLUMNS
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            line = 1
            for fields in reader:
                where = f"{path}, line {line}"
                if line == 1 and _is_header(fields):
                    columns = _header(fields, where)
                elif fields:
                    rows.append(_question(fields, columns, path, folder, where))
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not CSV in UTF-8: {error}. Save the file again as UTF-8 CSV.") from None
    if not rows:
        raise UserError(f"{path}: no questions. Remove the file or fill it.")
    return _File(tuple(rows), shows=columns != COLUMNS and bool(set(MEDIA) & set(columns)))


def _header(fields: list[str], where: str) -> tuple[str, ...]:
    """The columns that a header names."""
    columns = tuple(map(str.strip, fields))
    known = (*COLUMNS, *MEDIA)
    wrong = [name for name in columns if name not in known or columns.count(name) > 1]
    if wrong:
        raise UserError(f"{where}: the column {wrong[0]!r}: expected each of {', '.join(known)} once at most.")
    return columns


def _question(fields: list[str], columns: Sequence[str], path: Path, folder: Path, where: str) -> Question:
    if len(fields) != len(columns):
        named = "question, A, B, C, D, answer letter" if len(columns) == len(COLUMNS) else ", ".join(columns)
        raise UserError(
            f"{where}: {len(fields)} fields, expected {len(columns)}: {named}. "
            "Put a field that contains commas in double quotes."
        )
    by_name = dict(zip(columns, fields, strict=True))
    answer = by_name["answer"].strip()
    if answer not in set(LETTERS):
        last = "last field" if tuple(columns) == COLUMNS else "column answer"
        raise UserError(f"{where}: the answer ({last}) is {by_name['answer']!r}, expected one of A, B, C, D.")
    choices = tuple(by_name[letter] for letter in LETTERS)
    question = Question(by_name["question"], choices, LETTERS.index(answer), where)
    kinds = [name for name in columns if name in MEDIA and by_name[name].strip()]
    return replace(question, media=tuple((kind, _within(path, by_name[kind], folder, where)) for kind in kinds))


def _within(path: Path, named: str, folder: Path, where: str) -> Path:
    """The file that a field names, relative to the CSV file, as a path within a folder."""
    file = (path.parent / named.strip()).resolve()
    require_file(file, folder, where)
    return folder / file.relative_to(folder.resolve())
