"""The stages that cut a model to a shape, in an order that `transformers` takes, and running them in one stage."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from autoglm_compress.architecture import ModelShape
from autoglm_compress.errors import PlanError
from autoglm_compress.stages.base import Stage, StageContext
from autoglm_compress.stages.depth import Depth
from autoglm_compress.stages.ffn import Ffn
from autoglm_compress.stages.heads import Heads
from autoglm_compress.stages.width import Width

Refuses = Callable[[ModelShape], str]
"""Why a shape cannot be loaded; empty if it can."""


def surgeries(before: ModelShape, after: ModelShape, depth_method: str, refuses: Refuses) -> tuple[Stage, ...] | None:
    """The stages from one shape to another, or None if no order of them leads there.

    Layers go first, because less is left to cut then. Heads and width follow in the order that leaves a shape that can
    be loaded between them, or in one stage where neither order does.
    """
    steps: dict[str, Stage] = {}
    if after.num_hidden_layers != before.num_hidden_layers:
        options = {"stage": "depth", "num_hidden_layers": after.num_hidden_layers, "method": depth_method}
        steps["depth"] = Depth.model_validate(options)
    if after.intermediate_size != before.intermediate_size:
        steps["ffn"] = Ffn(stage="ffn", intermediate_size=after.intermediate_size)
    heads, groups = after.num_attention_heads, after.num_key_value_heads
    if (heads, groups) != (before.num_attention_heads, before.num_key_value_heads):
        kept = None if groups == before.num_key_value_heads else groups
        steps["heads"] = Heads(stage="heads", num_attention_heads=heads, kv_heads=kept)
    if after.hidden_size != before.hidden_size:
        steps["width"] = Width(stage="width", hidden_size=after.hidden_size)
    orders = [["depth", "heads", "ffn", "width"]]
    if "heads" in steps and "width" in steps:
        orders.append(["depth", "ffn", "width", "heads"])
        if groups == before.num_key_value_heads:
            steps["both"] = Width(stage="width", hidden_size=after.hidden_size, num_attention_heads=heads)
            orders.append(["depth", "ffn", "both"])
    for order in orders:
        chosen = tuple(steps[name] for name in order if name in steps)
        if _leads_to(before, chosen, refuses):
            return chosen
    return None


def _leads_to(before: ModelShape, steps: Sequence[Stage], refuses: Refuses) -> bool:
    shape = before
    for stage in steps:
        try:
            shape = stage.plan(shape)
        except PlanError:
            return False
        if refuses(shape):
            return False
    return True


def cut(context: StageContext, steps: Sequence[Stage], work: Path, result: Path) -> list[StageContext]:
    """Run stages one after the other, from a context's source into a folder; returns the context of each.

    A killed process that does the same again continues, and leaves the same bytes. What a step read is deleted once the
    next one has read it.

    Args:
        context: of the stage that runs these.
        steps: one or more.
        work: a folder for what is in between.
        result: the folder of the last one's checkpoint.
    """
    done: list[StageContext] = []
    folder, shape, lineage = context.source_folder, context.source.shape, context.lineage
    for number, stage in enumerate(steps):
        own, shape = work / f"{number}-{stage.stage}", stage.plan(shape)
        (own / "scratch").mkdir(parents=True, exist_ok=True)
        step = replace(
            context,
            source_folder=folder,
            shape=shape,
            lineage=lineage,
            work=own / "scratch",
            result=result if stage is steps[-1] else own / "result",
            decisions={},
            warnings=[],
        )
        stage.run(step)
        if done:
            shutil.rmtree(done[-1].work.parent)
        done.append(step)
        folder, lineage = step.result, step.lineage
    return done
