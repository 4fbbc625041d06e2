"""Accuracy of two models on the same multiple-choice questions."""

from autoglm_compress.comparison.gates import gate_on_answers
from autoglm_compress.comparison.limits import DEFAULT_MAX_DROP, Limits
from autoglm_compress.comparison.measure import Accuracy, Measure, Unit
from autoglm_compress.comparison.paired import drop_bounds, mcnemar
from autoglm_compress.comparison.results_file import Results
from autoglm_compress.errors import UserError
from autoglm_compress.records.task_results import Mmlu, Question

Pairs = list[tuple[Question, Question]]


def mmlu_measures(base: Results, new: Results, limits: Limits) -> list[Measure]:
    """Subjects, categories and the total; none where the files have no MMLU.

    Raises:
        UserError: the two are not of the same questions and prompts.
    """
    if base.mmlu is None or new.mmlu is None:
        return []
    subjects = _paired(base, new, base.mmlu, new.mmlu)
    categories: dict[str, Pairs] = {}
    for name, pairs in subjects.items():
        category = base.mmlu.subjects[name].category
        if category is not None:
            categories.setdefault(category, []).extend(pairs)
    every = [pair for pairs in subjects.values() for pair in pairs]
    return [
        *(_accuracy(name, "subject", pairs, limits) for name, pairs in subjects.items()),
        *(_accuracy(name, "category", pairs, limits) for name, pairs in sorted(categories.items())),
        _accuracy("mmlu", "total", every, limits),
    ]


def _paired(base: Results, new: Results, before: Mmlu, after: Mmlu) -> dict[str, Pairs]:
    """Both records of every question, by subject."""
    where = f"{new.path} and {base.path}"
    if before.num_fewshot != after.num_fewshot:
        raise UserError(
            f"{where}: num_fewshot is {after.num_fewshot} and {before.num_fewshot}. "
            "Evaluate both checkpoints with the same --num-fewshot."
        )
    known = {question.id: question for question in before.every_question}
    asked = {question.id for question in after.every_question}
    if known.keys() != asked:
        only_base, only_new = sorted(known.keys() - asked), sorted(asked - known.keys())
        example = (only_base or only_new)[0]
        raise UserError(
            f"{where}: not the same questions: {len(only_base)} only in the base, {len(only_new)} only in the new, "
            f"such as {example}. Evaluate both checkpoints with the same --mmlu, --subjects and --limit."
        )
    for name, subject in after.subjects.items():
        if name not in before.subjects or subject.prompts != before.subjects[name].prompts:
            raise UserError(
                f"{where}: {name}: the same questions in other prompts, from other worked examples or another version "
                "of lm-eval. Evaluate both checkpoints again in the same way."
            )
    return {
        name: [(known[question.id], question) for question in subject.records]
        for name, subject in after.subjects.items()
    }


def _accuracy(name: str, level: str, pairs: Pairs, limits: Limits) -> Accuracy:
    lost = sum(before.right and not after.right for before, after in pairs)
    won = sum(after.right and not before.right for before, after in pairs)
    count = len(pairs)
    low, high = drop_bounds(lost, won, count, limits.confidence)
    limit = DEFAULT_MAX_DROP if limits.max_drop is None else limits.max_drop
    same = all(before.log_likelihoods == after.log_likelihoods for before, after in pairs)
    return Accuracy(
        name=name,
        level=level,
        unit=Unit.percent_right,
        count=count,
        base=100 * sum(before.right for before, _ in pairs) / count,
        new=100 * sum(after.right for _, after in pairs) / count,
        change=100 * (won - lost) / count,
        low=-100 * high,
        high=-100 * low,
        higher_is_better=True,
        gate=gate_on_answers(lost, won, count, limit / 100, limits.confidence, same=same, shown=limit)
        if level == "total"
        else None,
        lost=lost,
        won=won,
        p_value=mcnemar(lost, won),
        same=same,
    )
