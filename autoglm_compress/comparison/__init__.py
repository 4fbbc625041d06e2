"""Whether one checkpoint is worse than another: paired statistics on what `evaluate` wrote of both."""

from autoglm_compress.comparison.compare import Comparison, compare
from autoglm_compress.comparison.limits import Limits

__all__ = ["Comparison", "Limits", "compare"]
