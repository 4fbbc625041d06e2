"""Compares two results files: the changes, their bounds, and the verdicts."""

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from autoglm_compress.comparison.accuracy import mmlu_measures
from autoglm_compress.comparison.held_out_text import agreement_measures, perplexity_measures
from autoglm_compress.comparison.limits import Limits
from autoglm_compress.comparison.measure import Gate, Measure
from autoglm_compress.comparison.results_file import Results
from autoglm_compress.comparison.task_metrics import metric_measures
from autoglm_compress.comparison.verdict import Verdict, overall
from autoglm_compress.errors import UserError


class Comparison(BaseModel):
    """All measures of two files, the totals last, and the tasks that were not compared."""

    model_config = ConfigDict(frozen=True)

    base: Results
    new: Results
    limits: Limits
    measures: tuple[SerializeAsAny[Measure], ...]
    not_compared: tuple[str, ...]

    @property
    def gated(self) -> list[tuple[Measure, Gate]]:
        """The measures with a verdict, and the gate that gives it."""
        return [(measure, measure.gate) for measure in self.measures if measure.gate is not None]

    @property
    def verdict(self) -> Verdict:
        """The verdict on all of them."""
        return overall([gate.verdict for _, gate in self.gated])


def compare(base: Results, new: Results, limits: Limits) -> Comparison:
    """Compare two results in pairs.

    Raises:
        UserError: the files differ in tasks, questions, prompts or text, a gated measure is missing, or nothing is
            gated.
    """
    _check_tasks(base, new, limits)
    measures = (
        *mmlu_measures(base, new, limits),
        *perplexity_measures(base, new, limits),
        *agreement_measures(base, new, limits),
        *metric_measures(base, new, limits),
    )
    return Comparison(
        base=base,
        new=new,
        limits=limits,
        measures=measures,
        not_compared=tuple(sorted(base.metrics.keys() ^ new.metrics.keys())),
    )


def _check_tasks(base: Results, new: Results, limits: Limits) -> None:
    for task in ("mmlu", "perplexity"):
        have = [results.path for results in (base, new) if getattr(results, task) is not None]
        if len(have) == 1:
            lacking = new.path if have[0] == base.path else base.path
            raise UserError(
                f"{lacking}: no task {task}, which {have[0]} has. Evaluate both checkpoints with the same --tasks."
            )
    for option, limit, task in (
        ("--max-drop", limits.max_drop, "mmlu"),
        ("--max-perplexity-increase", limits.max_perplexity_increase, "perplexity"),
    ):
        if limit is not None and getattr(base, task) is None:
            raise UserError(
                f"{option}: no task {task} in {base.path}, nor in {new.path}. Evaluate both checkpoints with "
                f"--tasks {task}."
            )
    for option, limit in (("--max-divergence", limits.max_divergence), ("--min-agreement", limits.min_agreement)):
        if limit is not None and new.agreement is None:
            raise UserError(
                f"{option}: {new.path} was not compared with the predictions of another checkpoint. Evaluate it with "
                "--against SOURCE."
            )
    if base.mmlu is None and limits.nothing_but_mmlu:
        raise UserError(
            f"{base.path}: no task mmlu, so that nothing would be gated. Give --max-perplexity-increase PERCENT or "
            "another limit, or evaluate with --tasks mmlu,perplexity."
        )
