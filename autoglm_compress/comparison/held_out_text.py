"""Perplexity of two models on the same text, and how close the new model's predictions are to its source's."""

import math

from autoglm_compress.comparison.gates import gate_on_rows
from autoglm_compress.comparison.limits import Limits
from autoglm_compress.comparison.measure import Gate, Measure, Unit
from autoglm_compress.comparison.paired import mean_bounds
from autoglm_compress.comparison.results_file import Results
from autoglm_compress.comparison.verdict import judge_value
from autoglm_compress.errors import UserError
from autoglm_compress.records.task_results import MOST_NATS, Agreement


def perplexity_measures(base: Results, new: Results, limits: Limits) -> list[Measure]:
    """Perplexity, its change by the mean over rows of the difference in log-likelihood per token, if both have it.

    Rows count as independent, although neighbours may be of one document.

    Raises:
        UserError: the two are not of the same tokens.
    """
    before, after = base.perplexity, new.perplexity
    if before is None or after is None:
        return []
    if before.text != after.text or len(before.rows) != len(after.rows):
        raise UserError(
            f"{new.path} and {base.path}: perplexity is not of the same tokens. Evaluate both checkpoints with the "
            "same --text, --samples and --sequence-length; models with other tokenizers cannot be compared."
        )
    differences = [ours - theirs for theirs, ours in zip(before.rows, after.rows, strict=True)]
    low, high = mean_bounds(differences, limits.confidence)
    allowed = limits.max_perplexity_increase
    gate = None
    if allowed is not None:
        gate = gate_on_rows(differences, math.log1p(allowed / 100), limits.confidence, allowed)
    measure = Measure(
        name="perplexity",
        level="total",
        unit=Unit.perplexity,
        count=len(differences),
        base=math.exp(math.fsum(before.rows) / len(before.rows)),
        new=math.exp(math.fsum(after.rows) / len(after.rows)),
        change=_percent(math.fsum(differences) / len(differences)),
        low=_percent(low),
        high=_percent(high),
        higher_is_better=False,
        gate=gate,
    )
    return [measure]


def _percent(nats: float) -> float:
    """The growth of perplexity in percent, from nats per token."""
    return 100 * math.expm1(min(nats, MOST_NATS))


def agreement_measures(base: Results, new: Results, limits: Limits) -> list[Measure]:
    """Divergence and share of the same likeliest tokens, if `evaluate --against` measured them of the new model.

    The limits apply to the new model's values alone. The base's values are shown only if they were measured on the same
    tokens, against the same checkpoint.
    """
    after = new.agreement
    if after is None:
        return []
    before = base.agreement
    if before is not None and (before.text, before.against) != (after.text, after.against):
        before = None
    return [_divergence(before, after, limits), _same_tokens(before, after, limits)]


def _divergence(before: Agreement | None, after: Agreement, limits: Limits) -> Measure:
    limit, gate = limits.max_divergence, None
    low = high = None
    if after.rows is not None:
        rows = after.rows.divergence
        low, high = mean_bounds(rows, limits.confidence)
        gate = None if limit is None else gate_on_rows(rows, limit, limits.confidence, limit)
    elif limit is not None:
        gate = Gate(limit, judge_value(after.divergence, limit))
    return Measure(
        name="divergence",
        level="total",
        unit=Unit.nats,
        count=None if after.rows is None else len(after.rows.divergence),
        base=None if before is None else before.divergence,
        new=after.divergence,
        change=None if before is None else after.divergence - before.divergence,
        low=None if low is None else max(low, 0.0),
        high=high,
        higher_is_better=False,
        absolute=True,
        gate=gate,
    )


def _same_tokens(before: Agreement | None, after: Agreement, limits: Limits) -> Measure:
    limit, gate = limits.min_agreement, None
    low = high = None
    if after.rows is not None:
        others = [1 - share for share in after.rows.top1]
        least, most = mean_bounds(others, limits.confidence)
        low, high = 100 * max(1 - most, 0.0), 100 * min(1 - least, 1.0)
        gate = None if limit is None else gate_on_rows(others, 1 - limit / 100, limits.confidence, limit)
    elif limit is not None:
        gate = Gate(limit, judge_value(-100 * after.top1, -limit))
    return Measure(
        name="agreement",
        level="total",
        unit=Unit.percent_of_tokens,
        count=None if after.rows is None else len(after.rows.top1),
        base=None if before is None else 100 * before.top1,
        new=100 * after.top1,
        change=None if before is None else 100 * (after.top1 - before.top1),
        low=low,
        high=high,
        higher_is_better=True,
        absolute=True,
        gate=gate,
    )
