"""Two results files side by side: what changed, between which bounds, and whether that passes."""

import math
from dataclasses import dataclass

from autoglm_compress.comparison.paired import drop_bounds, mcnemar, mean_bounds
from autoglm_compress.comparison.results_file import MOST_NATS, Mmlu, Perplexity, Question, Results
from autoglm_compress.comparison.verdict import (
    Verdict,
    judge_drop,
    judge_increase,
    overall,
    questions_to_decide,
    rows_to_decide,
)
from autoglm_compress.errors import UserError

DEFAULT_MAX_DROP = 1.0

Pairs = list[tuple[Question, Question]]


@dataclass(frozen=True)
class Limits:
    """What is allowed: points of accuracy lost, percent of perplexity gained (None: not gated), and how sure to be.

    `max_drop` None is 1 point where both files have MMLU.

    Raises:
        UserError: a number cannot be.
    """

    max_drop: float | None = None
    max_perplexity_increase: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UserError(f"--max-drop: given {self.max_drop:g}: expected points from 0 to 100.")
        if self.max_perplexity_increase is not None and not 0 <= self.max_perplexity_increase < math.inf:
            given = self.max_perplexity_increase
            raise UserError(f"--max-perplexity-increase: given {given:g}: expected percent from 0.")
        if not 0.5 < self.confidence < 1:
            raise UserError(
                f"--confidence: given {self.confidence:g}: expected a number between 0.5 and 1, such as 0.95."
            )


@dataclass(frozen=True)
class Gate:
    """A verdict on a measure, and how many questions or rows would decide it if it is undecided (None: none would)."""

    limit: float
    verdict: Verdict
    needed: int | None


@dataclass(frozen=True)
class Measure:
    """One measure of both: accuracies in percent, or perplexities.

    `change` and its bounds are from base to new, in points of accuracy or percent of perplexity; each bound holds with
    the confidence asked for. `level` is `total`, `category` or `subject`; `count` is the number of questions or rows.
    """

    name: str
    level: str
    count: int
    base: float
    new: float
    change: float
    low: float
    high: float
    gate: Gate | None = None


@dataclass(frozen=True)
class Accuracy(Measure):
    """Accuracy on the same questions: how many only the base answers right, how many only the new model, the p-value of
    McNemar's exact test, two-sided, and whether not one log-likelihood is another.
    """

    lost: int = 0
    won: int = 0
    p_value: float = 1.0
    same: bool = False


@dataclass(frozen=True)
class Comparison:
    """All measures of two files, the totals last, and the tasks that were not compared."""

    base: Results
    new: Results
    limits: Limits
    measures: tuple[Measure, ...]
    not_compared: tuple[str, ...]

    @property
    def gated(self) -> list[Measure]:
        """The measures with a verdict."""
        return [measure for measure in self.measures if measure.gate is not None]

    @property
    def verdict(self) -> Verdict:
        """The verdict on all of them."""
        return overall([measure.gate.verdict for measure in self.gated if measure.gate])


def compare(base: Results, new: Results, limits: Limits) -> Comparison:
    """Compare two results in pairs.

    Raises:
        UserError: they are not of the same tasks, questions, prompts or text, or nothing is gated.
    """
    _check_tasks(base, new, limits)
    measures: list[Measure] = []
    if base.mmlu and new.mmlu:
        measures += _accuracies(_paired(base, new, base.mmlu, new.mmlu), base.mmlu, limits)
    if base.perplexity and new.perplexity:
        measures.append(_perplexity(base, new, base.perplexity, new.perplexity, limits))
    return Comparison(base, new, limits, tuple(measures), tuple(sorted({*base.others, *new.others})))


def _check_tasks(base: Results, new: Results, limits: Limits) -> None:
    for task in ("mmlu", "perplexity"):
        have = [results.path for results in (base, new) if getattr(results, task) is not None]
        if len(have) == 1:
            lacking = new.path if have[0] == base.path else base.path
            raise UserError(
                f"{lacking}: no task {task}, which {have[0]} has. Evaluate both checkpoints with the same --tasks."
            )
    if base.mmlu is None and limits.max_drop is not None:
        raise UserError(f"--max-drop: no task mmlu in {base.path}, nor in {new.path}. Evaluate with --tasks mmlu.")
    if base.perplexity is None and limits.max_perplexity_increase is not None:
        raise UserError(
            f"--max-perplexity-increase: no task perplexity in {base.path}, nor in {new.path}. "
            "Evaluate with --tasks perplexity."
        )
    if base.mmlu is None and limits.max_perplexity_increase is None:
        raise UserError(
            f"{base.path}: no task mmlu, so that nothing would be gated. Give --max-perplexity-increase PERCENT, or "
            "evaluate with --tasks mmlu,perplexity."
        )


def _paired(base: Results, new: Results, before: Mmlu, after: Mmlu) -> dict[str, Pairs]:
    """Both records of every question, by subject."""
    where = f"{new.path} and {base.path}"
    if before.num_fewshot != after.num_fewshot:
        raise UserError(
            f"{where}: num_fewshot is {after.num_fewshot} and {before.num_fewshot}. "
            "Evaluate both checkpoints with the same --num-fewshot."
        )
    known = {question.id: question for question in before.questions}
    asked = {question.id for question in after.questions}
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


def _accuracies(subjects: dict[str, Pairs], described: Mmlu, limits: Limits) -> list[Measure]:
    categories: dict[str, Pairs] = {}
    for name, pairs in subjects.items():
        category = described.subjects[name].category
        if category is not None:
            categories.setdefault(category, []).extend(pairs)
    every = [pair for pairs in subjects.values() for pair in pairs]
    return [
        *(_accuracy(name, "subject", pairs, limits) for name, pairs in subjects.items()),
        *(_accuracy(name, "category", pairs, limits) for name, pairs in sorted(categories.items())),
        _accuracy("mmlu", "total", every, limits),
    ]


def _lost_and_won(pairs: Pairs) -> tuple[int, int]:
    lost = sum(before.right and not after.right for before, after in pairs)
    won = sum(after.right and not before.right for before, after in pairs)
    return lost, won


def _accuracy(name: str, level: str, pairs: Pairs, limits: Limits) -> Accuracy:
    lost, won = _lost_and_won(pairs)
    count = len(pairs)
    low, high = drop_bounds(lost, won, count, limits.confidence)
    same = all(before.log_likelihoods == after.log_likelihoods for before, after in pairs)
    return Accuracy(
        name=name,
        level=level,
        count=count,
        base=100 * sum(before.right for before, _ in pairs) / count,
        new=100 * sum(after.right for _, after in pairs) / count,
        change=100 * (won - lost) / count,
        low=-100 * high,
        high=-100 * low,
        gate=_gate(lost, won, count, same, limits) if level == "total" else None,
        lost=lost,
        won=won,
        p_value=mcnemar(lost, won),
        same=same,
    )


def _gate(lost: int, won: int, questions: int, same: bool, limits: Limits) -> Gate:
    """The verdict on all questions. A model that gives the very same log-likelihoods passes, however few they are."""
    limit = DEFAULT_MAX_DROP if limits.max_drop is None else limits.max_drop
    asked = lost, won, questions, limit / 100, limits.confidence
    verdict = Verdict.passed if same else judge_drop(*asked)
    return Gate(limit, verdict, questions_to_decide(*asked) if verdict is Verdict.undecided else None)


def _perplexity(base: Results, new: Results, before: Perplexity, after: Perplexity, limits: Limits) -> Measure:
    """Perplexity, its change by the mean over rows of the difference in log-likelihood per token.

    Rows count as independent, although neighbours may be of one document.
    """
    if before.text != after.text or len(before.rows) != len(after.rows):
        raise UserError(
            f"{new.path} and {base.path}: perplexity is not of the same tokens. Evaluate both checkpoints with the "
            "same --text, --samples and --sequence-length; models with other tokenizers cannot be compared."
        )
    differences = [ours - theirs for theirs, ours in zip(before.rows, after.rows, strict=True)]
    low, high = mean_bounds(differences, limits.confidence)
    gate = None
    if limits.max_perplexity_increase is not None:
        limit = math.log1p(limits.max_perplexity_increase / 100)
        verdict = judge_increase(differences, limit, limits.confidence)
        needed = rows_to_decide(differences, limit, limits.confidence) if verdict is Verdict.undecided else None
        gate = Gate(limits.max_perplexity_increase, verdict, needed)
    return Measure(
        name="perplexity",
        level="total",
        count=len(differences),
        base=math.exp(math.fsum(before.rows) / len(before.rows)),
        new=math.exp(math.fsum(after.rows) / len(after.rows)),
        change=_percent(math.fsum(differences) / len(differences)),
        low=_percent(low),
        high=_percent(high),
        gate=gate,
    )


def _percent(nats: float) -> float:
    """By how many percent perplexity grows with so many nats per token."""
    return 100 * math.expm1(min(nats, MOST_NATS))
