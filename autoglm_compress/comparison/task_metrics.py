"""Metrics of other tasks of lm-eval, document by document where these are on record, else as single numbers."""

import difflib
from typing import Any

from autoglm_compress.comparison.gates import gate_on_answers, gate_on_rows
from autoglm_compress.comparison.limits import Limits
from autoglm_compress.comparison.measure import Accuracy, Gate, Measure, Unit
from autoglm_compress.comparison.paired import drop_bounds, mcnemar, mean_bounds
from autoglm_compress.comparison.results_file import Results, TaskMetrics
from autoglm_compress.comparison.verdict import judge_value
from autoglm_compress.errors import UserError


def metric_measures(base: Results, new: Results, limits: Limits) -> list[Measure]:
    """Every metric that both files have of another task than MMLU and perplexity.

    Raises:
        UserError: the two are not of the same documents, or a metric that is gated is not there.
    """
    shared = [task for task in base.metrics if task in new.metrics]
    for task in shared:
        documents = base.metrics[task].records.documents, new.metrics[task].records.documents
        if None not in documents and documents[0] != documents[1]:
            same = "version of lm-eval and of the task's data"
            if task == "generate":
                same = "--generate, --limit, --ignore and --max-new-tokens"
            raise UserError(
                f"{new.path} and {base.path}: {task}: not the same documents and prompts. Evaluate both checkpoints "
                f"with the same {same}."
            )
    pairs = {
        f"{task}:{metric}": (base.metrics[task], new.metrics[task], metric)
        for task in shared
        for metric in new.metrics[task].values
        if metric in base.metrics[task].values
    }
    for name in limits.max_loss:
        if name not in pairs:
            raise _not_there(name, base, new, list(pairs))
    return [_measure(name, *pair, limits) for name, pair in pairs.items()]


def _not_there(name: str, base: Results, new: Results, known: list[str]) -> UserError:
    task, _, metric = name.partition(":")
    for results in (base, new):
        if task not in results.metrics:
            return UserError(
                f"--max-loss {name}: no task {task} in {results.path}. Evaluate both checkpoints with --tasks {task}."
            )
    near = difflib.get_close_matches(name, known, n=1) or [other for other in known if other.startswith(f"{task}:")]
    return UserError(f"--max-loss {name}: {task} has no metric {metric}. Did you mean {' or '.join(near)}?")


def _measure(name: str, before: TaskMetrics, after: TaskMetrics, metric: str, limits: Limits) -> Measure:
    better = after.records.higher_is_better.get(metric)
    limit = limits.max_loss.get(name)
    if limit is not None and better is None:
        raise UserError(f"--max-loss {name}: the file does not say whether more of it is better. Evaluate again.")
    old, new = before.values[metric], after.values[metric]
    then, now = before.records.values.get(metric), after.records.values.get(metric)
    fields: dict[str, Any] = {
        "name": name,
        "level": "total",
        "unit": Unit.own,
        "base": old,
        "new": new,
        "change": new - old,
        "higher_is_better": better,
    }
    if then is None or now is None or not len(then) == len(now) > 1 or better is None:
        loss = old - new if better else new - old
        gate = None if limit is None else Gate(limit, judge_value(loss, limit))
        return Measure(count=None, low=None, high=None, gate=gate, **fields)
    sign = 1 if better else -1
    losses = [sign * (old - new) for old, new in zip(then, now, strict=True)]
    if set(then + now) <= {0.0, 1.0} and better:
        answers = before.records.responses, after.records.responses
        same = None not in answers and answers[0] == answers[1]
        return _right_or_wrong(losses, limit, limits.confidence, same, fields)
    low, high = mean_bounds(losses, limits.confidence)
    gate = None if limit is None else gate_on_rows(losses, limit, limits.confidence, limit)
    bounds = (-high, -low) if better else (low, high)
    return Measure(count=len(losses), low=bounds[0], high=bounds[1], gate=gate, **fields)


def _right_or_wrong(
    losses: list[float], limit: float | None, confidence: float, same: bool, fields: dict[str, Any]
) -> Accuracy:
    """A metric that is 1 or 0 of each document, as accuracies are. `same`: not one answer's likelihood changed."""
    lost, won, count = losses.count(1.0), losses.count(-1.0), len(losses)
    low, high = drop_bounds(lost, won, count, confidence)
    gate = None
    if limit is not None:
        gate = gate_on_answers(lost, won, count, min(limit, 1.0), confidence, same=same, shown=limit)
    p_value = mcnemar(lost, won)
    return Accuracy(
        count=count, low=-high, high=-low, gate=gate, lost=lost, won=won, p_value=p_value, same=same, **fields
    )
