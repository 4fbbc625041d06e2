"""MMLU as lm-eval defines it, with the questions from the hub or from a folder of CSV files.

Prompts, few-shot sampling and metric are those of lm-eval's own task files. This module only decides where questions
come from and which are asked; `questions.py` reads a folder, and `mmlu_result.py` makes the results.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig

from autoglm_compress.evaluation.chat_task import ChatTask
from autoglm_compress.evaluation.folder_task import FEATURES, FolderTask, as_documents, dataset_of
from autoglm_compress.evaluation.questions import check_subjects, read_subjects

TASK_FILES = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
PREFIX = "mmlu::"


def mmlu_group(folder: Path | None, num_fewshot: int, subjects: Sequence[str] | None = None) -> Group:
    """The subjects as one lm-eval group, whose accuracy is over all questions.

    Args:
        folder: the questions; None for `cais/mmlu` from the hub.
        num_fewshot: worked examples before each question: the first ones of the subject's dev split.
        subjects: those to ask about; None for all there are.

    Raises:
        UserError: the folder or a file in it is not as `questions.py` describes, or has not all the subjects.
    """
    group = Group("mmlu", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    tasks = _hub_tasks(num_fewshot, subjects) if folder is None else _folder_tasks(folder, num_fewshot, subjects)
    for task in tasks:
        group.add(task)
    return group


def chosen_questions(group: Group, limit: int | None) -> dict[str, list[int]]:
    """The indices of the questions asked of each task: a fixed random choice. A smaller limit takes a subset of it."""
    chosen = {}
    for task in group.get_all_tasks():
        order = list(range(len(task.eval_docs)))
        random.Random(task.task_name).shuffle(order)
        chosen[task.task_name] = sorted(order[:limit])
    return chosen


def description(subject: str) -> str:
    """The sentence that opens a prompt, as lm-eval's task files word it."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def _template() -> dict[str, Any]:
    return yaml.safe_load((TASK_FILES / "_default_template_yaml").read_text(encoding="utf-8"))


def stock_tasks() -> list[dict[str, Any]]:
    """What lm-eval's own task file says of each subject, in the order of their names."""
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TASK_FILES.glob("mmlu_*.yaml"))]


def _hub_tasks(num_fewshot: int, subjects: Sequence[str] | None) -> list[ConfigurableTask]:
    stocks = {stock["dataset_name"]: stock for stock in stock_tasks()}
    if subjects is not None:
        check_subjects(subjects, stocks, "MMLU")
    tasks = []
    for subject, stock in stocks.items():
        if subjects is not None and subject not in subjects:
            continue
        settings = {key: stock[key] for key in ("dataset_name", "description", "task_alias")}
        config = _template() | settings | {"task": PREFIX + stock["dataset_name"], "num_fewshot": num_fewshot}
        tasks.append(ConfigurableTask(config=config))
    return tasks


def _folder_tasks(folder: Path, num_fewshot: int, subjects: Sequence[str] | None) -> list[ConfigurableTask]:
    tasks: list[ConfigurableTask] = []
    for subject in read_subjects(folder, num_fewshot, subjects):
        config = _template() | {
            "task": PREFIX + subject.name,
            "description": description(subject.name),
            "num_fewshot": num_fewshot,
        }
        if subject.shows:
            tasks.append(ChatTask(subject, config))
            continue
        splits = {"test": subject.questions, "dev": subject.examples}
        questions = {split: dataset_of(as_documents(some, subject.name), FEATURES) for split, some in splits.items()}
        tasks.append(FolderTask(questions, config))
    return tasks
