"""How good a checkpoint is: MMLU, perplexity, other lm-eval tasks and generated answers."""

from autoglm_compress.evaluation.evaluate import check_tasks, evaluate
from autoglm_compress.evaluation.options import EvaluationOptions, MmluOptions, PerplexityOptions

__all__ = ["EvaluationOptions", "MmluOptions", "PerplexityOptions", "check_tasks", "evaluate"]
