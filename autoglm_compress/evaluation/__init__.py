"""How good a checkpoint is: MMLU, perplexity and other lm-eval tasks, scored one decoder layer at a time."""

from autoglm_compress.evaluation.evaluate import (
    EvaluationOptions,
    MmluOptions,
    PerplexityOptions,
    check_tasks,
    evaluate,
)

__all__ = ["EvaluationOptions", "MmluOptions", "PerplexityOptions", "check_tasks", "evaluate"]
