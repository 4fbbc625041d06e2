"""Multiple-choice questions as the CSV files of an MMLU folder, and results files with answers to such questions."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
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
    divergences: Sequence[float] | None = None,
    acc: str | None = None,
) -> dict[str, Any]:
    """What `evaluate` writes, as far as `compare` reads it.

    Args:
        right: a 1 or 0 for each question, by subject; anatomy counts as stem, law as humanities. None for no MMLU.
        rows: negative log-likelihoods for perplexity.
        shift: added to every log-likelihood of an answer.
        num_fewshot: as recorded.
        divergences: of rows, from the source's predictions; a row of 0.1 nats agrees on 99 % of its
            tokens. None for no agreement.
        acc: a 1 or 0 for each document of the task arc_easy, whose `perplexity` is 2 minus that.
    """
    tasks: dict[str, Any] = {}
    if right is not None:
        subjects = {
            subject: {
                "category": {"anatomy": "stem", "law": "humanities"}.get(subject),
                "accuracy": marks.count("1") / max(len(marks), 1),
                "prompts": f"prompts of {subject}",
                "records": [_record(f"{subject}/{number}/h", mark == "1", shift) for number, mark in enumerate(marks)],
            }
            for subject, marks in right.items()
        }
        every = "".join(right.values())
        right_share = every.count("1") / max(len(every), 1)
        tasks["mmlu"] = {
            "settings": {},
            "result": {"num_fewshot": num_fewshot, "accuracy": right_share, "subjects": subjects},
        }
    if rows is not None:
        tasks["perplexity"] = {"settings": {}, "result": {"text": "a text", "rows": list(rows)}}
    if divergences is not None:
        top1 = [1 - value / 10 for value in divergences]
        means = {"divergence": fmean(divergences), "top1": fmean(top1)}
        found = means | {"text": "a text", "against": "a", "rows": {"divergence": list(divergences), "top1": top1}}
        tasks["agreement"] = {"settings": {}, "result": found}
    if acc is not None:
        values = {"acc": [float(mark) for mark in acc], "perplexity": [2.0 - float(mark) for mark in acc]}
        records = {
            "documents": "some",
            "responses": acc,
            "higher_is_better": {"acc": True, "perplexity": False},
            "values": values,
        }
        means = {name: fmean(found) for name, found in values.items()}
        tasks["arc_easy"] = {"settings": {}, "result": means | {"acc_stderr": 0.1, "records": records}}
    return {"schema_version": 1, "tasks": tasks}


def _record(identifier: str, right: bool, shift: float) -> dict[str, Any]:
    values = [-1.0 + shift, -2.0 + shift, -3.0 + shift, -4.0 + shift]
    return {"id": identifier, "log_likelihoods": values, "choice": "A", "right": right}


def save(path: Path, data: Any) -> Path:
    """Write JSON."""
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
