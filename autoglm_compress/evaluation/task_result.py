"""The result of an lm-eval task other than MMLU: its metrics, and their values for every document."""

import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from autoglm_compress.hashing import hash_of


def task_result(results: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of one task, or group of tasks, in lm-eval's results.

    Args:
        results: what lm-eval's `evaluate` returns.
        name: of the task or group.

    Returns:
        The metrics as numbers, named `metric` or, where answers were filtered, `metric,filter`, with their standard
        errors, and `records`: `higher_is_better` by metric (None where the tasks of a group disagree), and of a task
        `documents`, a hash of all that the model was shown, `responses`, one of all that it answered, and `values`,
        which has every metric that is a mean over the documents with its value for each.
    """
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in results["results"][name].items()
        if "," in key and isinstance(value, int | float)
    }
    direction = results["higher_is_better"].get(name, {})
    records: dict[str, Any] = {
        "higher_is_better": {
            metric: direction.get(metric.partition(",")[0]) for metric in metrics if "_stderr" not in metric
        }
    }
    samples = results["samples"].get(name)
    if samples:
        records["documents"] = _hash([sample["doc_hash"], *sample["arguments"]] for sample in samples)
        records["responses"] = _hash(sample["filtered_resps"] for sample in samples)
        records["values"] = _values(samples, metrics)
    return metrics | {"records": records}


def _values(samples: Sequence[dict[str, Any]], metrics: dict[str, float]) -> dict[str, list[float]]:
    """The value for each document, for metrics that are means over documents."""
    found = {}
    for metric, mean in metrics.items():
        name, _, chosen = metric.partition(",")
        values = [sample.get(name) for sample in samples if sample["filter"] == (chosen or "none")]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers and len(numbers) == len(values) and math.isclose(fmean(numbers), mean, abs_tol=1e-9):
            found[metric] = numbers
    return found


def _hash(data: Iterable[Any]) -> str:
    return hash_of(json.dumps(list(data), ensure_ascii=False, default=str))
