"""Measure the checkpoint before this stage."""

from typing import Literal

from pydantic import Field

from autoglm_compress.architecture import ModelShape
from autoglm_compress.stages.base import Makes, Stage, StageContext


class Evaluate(Stage):
    """Run tasks with the recipe's settings: `perplexity`, `mmlu`, `generate`, and those of lm-eval that are scored by
    log-likelihood.
    """

    stage: Literal["evaluate"]
    tasks: tuple[str, ...] = Field(default=("mmlu", "perplexity"), min_length=1)

    makes = Makes.MEASUREMENT
    reads_quantized = True

    @property
    def evaluates(self) -> tuple[str, ...]:
        """The tasks."""
        return self.tasks

    def plan(self, shape: ModelShape) -> ModelShape:
        """The same shape."""
        return shape

    def run(self, context: StageContext) -> None:
        """Evaluate `context.source`."""
        context.decisions = context.evaluate(self.tasks)
