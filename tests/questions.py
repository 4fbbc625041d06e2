"""Multiple-choice questions as the CSV files of an MMLU folder, and results files with answers to such questions."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = [
    ("Which of these is a river?", "Nile", "Oak", "Seven", "Red, or blue", "A"),
    ("Which of these is a tree?", "Rhine", "Oak", "Nine", "Green", "B"),
    ("Which is a number?\nThink first.", "Po", "Elm", "Ten", "Grey", "C"),
]


def write(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """A CSV file without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)


def write_quiz(folder: Path, *subjects: str) -> Path:
    """Two worked examples and twelve questions of each subject."""
    asked = [(f"{number}. {question[0]}", *question[1:]) for number, question in enumerate(QUESTIONS * 4)]
    for subject in subjects:
        write(folder / "dev" / f"{subject}_dev.csv", QUESTIONS[:2])
        write(folder / "test" / f"{subject}_test.csv", asked)
    return folder


def results(
    right: Mapping[str, str] | None = None,
    rows: Sequence[float] | None = None,
    shift: float = 0.0,
    num_fewshot: int = 5,
) -> dict[str, Any]:
    """What `evaluate` writes, as far as `compare` reads it.

    Args:
        right: a 1 or 0 for each question, by subject; anatomy counts as stem, law as humanities. None for no MMLU.
        rows: negative log-likelihoods for perplexity.
        shift: added to every log-likelihood of an answer.
        num_fewshot: as recorded.
    """
    tasks: dict[str, Any] = {}
    if right is not None:
        subjects = {
            subject: {
                "category": {"anatomy": "stem", "law": "humanities"}.get(subject),
                "prompts": f"prompts of {subject}",
                "records": [_record(f"{subject}/{number}/h", mark == "1", shift) for number, mark in enumerate(marks)],
            }
            for subject, marks in right.items()
        }
        tasks["mmlu"] = {"settings": {}, "result": {"num_fewshot": num_fewshot, "subjects": subjects}}
    if rows is not None:
        tasks["perplexity"] = {"settings": {}, "result": {"text": "a text", "rows": list(rows)}}
    return {"schema_version": 1, "tasks": tasks}


def _record(identifier: str, right: bool, shift: float) -> dict[str, Any]:
    values = [-1.0 + shift, -2.0 + shift, -3.0 + shift, -4.0 + shift]
    return {"id": identifier, "log_likelihoods": values, "choice": "A", "right": right}


def save(path: Path, data: Any) -> Path:
    """Write JSON."""
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
