"""The change of accuracy and its error. On the same questions, shared noise cancels."""

import math

from autoglm_compress.records.task_results import MmluSummary, Scores


def change(scores: Scores, source: Scores) -> tuple[float, float | None]:
    """The change of accuracy and its standard error.

    The standard error is None if single answers are not recorded for both, or if no answer changed, which does not tell
    how many could have.
    """
    differences = [int(now) - int(then) for now, then in _pairs(scores, source)]
    count = len(differences)
    if count < 2:
        return scores.accuracy - source.accuracy, None
    mean = sum(differences) / count
    variance = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return scores.accuracy - source.accuracy, math.sqrt(variance / count) or None


def _pairs(scores: Scores, source: Scores) -> list[tuple[str, str]]:
    """The answers to each question, of all subjects; none where the two were not asked the same number."""
    if isinstance(scores, MmluSummary) and isinstance(source, MmluSummary):
        if scores.subjects.keys() != source.subjects.keys():
            return []
        by_subject = [_pairs(found, source.subjects[name]) for name, found in scores.subjects.items()]
        return [pair for pairs in by_subject for pair in pairs] if all(by_subject) else []
    if len(scores.correct) != len(source.correct):
        return []
    return list(zip(scores.correct, source.correct, strict=True))
