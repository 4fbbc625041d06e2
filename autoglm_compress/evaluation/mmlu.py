"""MMLU as lm-eval defines it, with the questions from the hub or from a folder of CSV files.

Prompts, few-shot sampling and metric are those of lm-eval's own task files. This module only decides where questions
come from and which are asked; `mmlu_result.py` makes the results.

A folder has the layout of the original MMLU archive: `test/<subject>_test.csv` and `dev/<subject>_dev.csv` (or just
`<subject>.csv`), no header, six fields a row: question, A, B, C, D, letter of the answer. Any subjects will do.
"""

import csv
import difflib
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from datasets import Dataset, Features, Value
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig

from autoglm_compress.errors import UserError

TASK_FILES = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
PREFIX = "mmlu::"
LETTERS = "ABCD"
FEATURES = Features(
    {"question": Value("string"), "subject": Value("string"), "choices": [Value("string")], "answer": Value("int64")}
)
NO_QUESTIONS = Dataset.from_dict({name: [] for name in FEATURES}, FEATURES)


class FolderTask(ConfigurableTask):
    """An lm-eval task on questions that are in memory already, by split."""

    def __init__(self, questions: dict[str, Dataset], config: dict[str, Any]) -> None:
        self.dataset = questions
        super().__init__(config=config)

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the questions came with the constructor."""


def mmlu_group(folder: Path | None, num_fewshot: int, subjects: Sequence[str] | None = None) -> Group:
    """The subjects as one lm-eval group, whose accuracy is over all questions.

    Args:
        folder: the questions; None for `cais/mmlu` from the hub.
        num_fewshot: worked examples before each question: the first ones of the subject's dev split.
        subjects: those to ask about; None for all there are.

    Raises:
        UserError: the folder or a file in it is not as described above, or has not all the subjects.
    """
    group = Group("mmlu", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    tasks = _hub_tasks(num_fewshot, subjects) if folder is None else _folder_tasks(folder, num_fewshot, subjects)
    for task in tasks:
        group.add(task)
    return group


def _check_subjects(subjects: Sequence[str], known: Collection[str], where: str) -> None:
    for subject in subjects:
        if subject not in known:
            near = difflib.get_close_matches(subject, known, n=3) or sorted(known)[:3]
            raise UserError(
                f"subjects: no subject {subject!r} among the {len(known)} of {where}. Did you mean {' or '.join(near)}?"
            )


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
        _check_subjects(subjects, stocks, "MMLU")
    tasks = []
    for subject, stock in stocks.items():
        if subjects is not None and subject not in subjects:
            continue
        settings = {key: stock[key] for key in ("dataset_name", "description", "task_alias")}
        config = _template() | settings | {"task": PREFIX + stock["dataset_name"], "num_fewshot": num_fewshot}
        tasks.append(ConfigurableTask(config=config))
    return tasks


def _folder_tasks(folder: Path, num_fewshot: int, subjects: Sequence[str] | None) -> list[ConfigurableTask]:
    tests = _files(folder, "test")
    if subjects is not None:
        _check_subjects(subjects, tests, str(folder / "test"))
        tests = {subject: path for subject, path in tests.items() if subject in subjects}
    examples = _files(folder, "dev") if num_fewshot > 0 else {}
    missing = sorted(set(tests) - set(examples)) if num_fewshot > 0 else []
    if missing:
        raise UserError(
            f"{folder / 'dev'}: no {missing[0]}_dev.csv; num_fewshot asks for {num_fewshot} worked examples. "
            "Add the file, or set num_fewshot to 0."
        )
    tasks = []
    for subject, path in tests.items():
        questions = {
            "test": _read(path, subject),
            "dev": _read(examples[subject], subject) if num_fewshot > 0 else NO_QUESTIONS,
        }
        if len(questions["dev"]) < num_fewshot:
            raise UserError(
                f"{examples[subject]}: {len(questions['dev'])} examples, but num_fewshot is {num_fewshot}. "
                "Add examples or lower num_fewshot."
            )
        config = _template() | {
            "task": PREFIX + subject,
            "description": description(subject),
            "num_fewshot": num_fewshot,
        }
        tasks.append(FolderTask(questions, config))
    return tasks


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


def _read(path: Path, subject: str) -> Dataset:
    """The questions of a CSV file."""
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            line = 1
            for fields in reader:
                if fields:
                    rows.append(_question(fields, subject, f"{path}, line {line}"))
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not CSV in UTF-8: {error}. Save the file again as UTF-8 CSV.") from None
    if not rows:
        raise UserError(f"{path}: no questions. Remove the file or fill it.")
    return Dataset.from_list(rows, FEATURES)


def _question(fields: list[str], subject: str, where: str) -> dict[str, Any]:
    if len(fields) != 6:
        raise UserError(
            f"{where}: {len(fields)} fields, expected 6: question, A, B, C, D, answer letter. "
            "Put a field that contains commas in double quotes."
        )
    question, *choices, answer = fields
    if answer.strip() not in set(LETTERS):
        raise UserError(f"{where}: the answer (last field) is {answer!r}, expected one of A, B, C, D.")
    return {"question": question, "subject": subject, "choices": choices, "answer": LETTERS.index(answer.strip())}
