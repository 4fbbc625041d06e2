"""Whether one checkpoint is worse than another: paired statistics on what `evaluate` wrote of both."""

from autoglm_compress.comparison.compare import Comparison, Limits, compare

__all__ = ["Comparison", "Limits", "compare"]
