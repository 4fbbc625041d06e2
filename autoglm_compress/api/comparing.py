"""Comparing two files of results."""

from collections.abc import Mapping
from pathlib import Path

from autoglm_compress.api.arguments import Place
from autoglm_compress.checked import checked
from autoglm_compress.comparison.compare import Comparison
from autoglm_compress.comparison.compare import compare as compare_results
from autoglm_compress.comparison.limits import Limits
from autoglm_compress.comparison.results_file import read_results


@checked
def compare(
    base: Place,
    new: Place,
    *,
    max_drop: float | None = None,
    max_perplexity_increase: float | None = None,
    max_divergence: float | None = None,
    min_agreement: float | None = None,
    max_loss: Mapping[str, float] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Tell whether one checkpoint is worse than another by more than allowed, on the same questions and text.

    Args:
        base: a results file of `evaluate`, or one of the `evaluations` folder of a run.
        new: another.
        max_drop: points of accuracy that may be lost on MMLU; 1 by default, if both were asked.
        max_perplexity_increase: in percent of the base's; not gated by default, as the following.
        max_divergence: in nats, of the new model's predictions from those of `evaluate`'s `against`.
        min_agreement: percent of tokens that the new model and `against` both find likeliest.
        max_loss: how much worse a metric of another task may be, by `task:metric`, in its own unit.
        confidence: with which each bound holds.

    Raises:
        UserError: an argument is of a wrong type, a limit is not valid, or the two files cannot be compared.
    """
    limits = Limits(max_drop, max_perplexity_increase, max_divergence, min_agreement, max_loss or {}, confidence)
    return compare_results(read_results(Path(base)), read_results(Path(new)), limits)
