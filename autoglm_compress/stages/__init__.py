"""The stages a recipe can chain. Other packages add theirs under the entry point group `autoglm_compress.stages`."""

from functools import cache
from importlib.metadata import entry_points

from autoglm_compress.stages.base import Makes, PlanError, Stage, StageContext
from autoglm_compress.stages.depth import Depth
from autoglm_compress.stages.evaluate import Evaluate
from autoglm_compress.stages.ffn import Ffn
from autoglm_compress.stages.heads import Heads
from autoglm_compress.stages.heal import Heal
from autoglm_compress.stages.quantize import Quantize
from autoglm_compress.stages.refit import Refit
from autoglm_compress.stages.tie import Tie
from autoglm_compress.stages.width import Width

__all__ = ["Makes", "PlanError", "Stage", "StageContext", "stage_types"]

BUILT_IN: dict[str, type[Stage]] = {
    "depth": Depth,
    "heads": Heads,
    "ffn": Ffn,
    "width": Width,
    "tie": Tie,
    "refit": Refit,
    "heal": Heal,
    "quantize": Quantize,
    "evaluate": Evaluate,
}


@cache
def stage_types() -> dict[str, type[Stage]]:
    """Every stage by the name a recipe gives after `stage:`; a built-in name cannot be replaced."""
    return {entry.name: entry.load() for entry in entry_points(group="autoglm_compress.stages")} | BUILT_IN
