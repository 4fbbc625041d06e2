"""The result of MMLU: a record of every question, and accuracies by subject, by category and in total."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import yaml
from lm_eval.api.group import Group
from lm_eval.api.metrics import pooled_sample_stderr

from autoglm_compress.evaluation.mmlu import PREFIX, TASK_FILES, stock_tasks
from autoglm_compress.evaluation.questions import LETTERS
from autoglm_compress.hashing import hash_of

DIGITS = 6
"""Decimals of recorded log-likelihoods. Floating-point noise is about as large as the last one."""
HASH_LENGTH = 12


def mmlu_result(results: dict[str, Any], group: Group, num_fewshot: int) -> dict[str, Any]:
    """MMLU's part of lm-eval's results, by subject, by category and in all.

    Args:
        results: what lm-eval's `evaluate` returns.
        group: the subjects that were asked.
        num_fewshot: the worked examples of each prompt.

    Returns:
        `accuracy`, `stderr`, `questions` and `num_fewshot`; `categories`, with the first three for each of MMLU's four
        that a subject belongs to; `subjects`, with the first three for each, and besides them `category` (None if it is
        not MMLU's), `correct`, a 1 or 0 per question in the order of the file, `prompts`, a hash of all that the model
        was shown, and `records`.
        A record has `id`, `log_likelihoods` of the four answers in nats, `choice` and `right`. Standard errors are
        None where there are too few questions for one.
    """
    subjects = {
        task.task_name.removeprefix(PREFIX): _subject(
            task.task_name.removeprefix(PREFIX), results["samples"][task.task_name], results["results"][task.task_name]
        )
        for task in group.get_all_tasks()
    }
    overall = results["results"][group.name]
    return {
        "accuracy": float(overall["acc,none"]),
        "stderr": _stderr(overall),
        "questions": sum(subject["questions"] for subject in subjects.values()),
        "categories": _by_category(subjects),
        "subjects": subjects,
        "num_fewshot": num_fewshot,
    }


def _subject(name: str, samples: Sequence[dict[str, Any]], scores: dict[str, Any]) -> dict[str, Any]:
    records = [_record(name, sample) for sample in samples]
    correct = "".join(str(int(record["right"])) for record in records)
    return {
        "accuracy": float(scores["acc,none"]),
        "stderr": _stderr(scores),
        "questions": len(records),
        "category": category_of_subject().get(name),
        "correct": correct,
        "prompts": _hash(sample["arguments"] for sample in samples),
        "records": records,
    }


def _record(subject: str, sample: dict[str, Any]) -> dict[str, Any]:
    """One question. Its `id` is the subject, the place in the file from 0, and a hash of question, choices and key, and
    of its images and sounds.
    """
    values = [value for value, _ in sample["filtered_resps"]]
    asked = [sample["doc"][field] for field in ("question", "choices", "answer")]
    asked += [[each["type"], each["sha256"]] for each in sample["doc"].get("media", ())]
    return {
        "id": f"{subject}/{sample['doc_id']}/{_hash(asked)}",
        "log_likelihoods": [round(value, DIGITS) for value in values],
        "choice": LETTERS[values.index(max(values))],
        "right": bool(sample["acc"]),
    }


def _hash(data: Iterable[Any]) -> str:
    return hash_of(json.dumps(list(data), ensure_ascii=False), HASH_LENGTH)


def _stderr(scores: dict[str, Any]) -> float | None:
    value = scores["acc_stderr,none"]
    return None if value == "N/A" else float(value)


def _by_category(subjects: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy over all questions of each category, with the standard error as lm-eval pools it."""
    members: dict[str, list[dict[str, Any]]] = {}
    for subject in subjects.values():
        if subject["category"] is not None:
            members.setdefault(subject["category"], []).append(subject)
    return {
        category: {
            "accuracy": sum(subject["correct"].count("1") for subject in found)
            / sum(subject["questions"] for subject in found),
            "stderr": _pooled(found),
            "questions": sum(subject["questions"] for subject in found),
        }
        for category, found in sorted(members.items())
    }


def _pooled(subjects: Sequence[dict[str, Any]]) -> float | None:
    spreads = [subject["stderr"] for subject in subjects]
    if None in spreads:
        return None
    return float(pooled_sample_stderr(spreads, [subject["questions"] for subject in subjects]))


@cache
def category_of_subject() -> dict[str, str]:
    """The category of each of MMLU's subjects, as the tags and groups in lm-eval's task files have it."""
    category_of_tag: dict[str, str] = {}
    for path in TASK_FILES.glob("_mmlu_*.yaml"):
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
        category_of_tag |= dict.fromkeys(described["task"], described["group_alias"])
    return {stock["dataset_name"]: category_of_tag[stock["tag"]] for stock in stock_tasks()}
