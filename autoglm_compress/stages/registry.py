"""The available stages: those of this package, and those that other packages add by an entry point."""

from functools import cache
from importlib import metadata

from autoglm_compress.stages.attention import Attention
from autoglm_compress.stages.base import Stage
from autoglm_compress.stages.depth import Depth
from autoglm_compress.stages.evaluate import Evaluate
from autoglm_compress.stages.export import Export
from autoglm_compress.stages.ffn import Ffn
from autoglm_compress.stages.heads import Heads
from autoglm_compress.stages.heal import Heal
from autoglm_compress.stages.quantize import Quantize
from autoglm_compress.stages.refit import Refit
from autoglm_compress.stages.shape import Shape
from autoglm_compress.stages.share_adapter import ShareAdapter
from autoglm_compress.stages.tie import Tie
from autoglm_compress.stages.width import Width

GROUP = "autoglm_compress.stages"
"""The group of the entry points, each named as a recipe names its stage."""
BUILT_IN: dict[str, type[Stage]] = {
    "shape": Shape,
    "depth": Depth,
    "heads": Heads,
    "ffn": Ffn,
    "width": Width,
    "tie": Tie,
    "share_adapter": ShareAdapter,
    "refit": Refit,
    "heal": Heal,
    "quantize": Quantize,
    "attention": Attention,
    "evaluate": Evaluate,
    "export": Export,
}


def stage_types() -> dict[str, type[Stage]]:
    """Every stage that can be used, by the name a recipe gives after `stage:`; a built-in name cannot be replaced."""
    return plug_ins()[0] | BUILT_IN


def broken_stages() -> dict[str, str]:
    """The stages of other packages that cannot be used, by name, and why: entry point, package and error."""
    return {name: reason for name, reason in plug_ins()[1].items() if name not in stage_types()}


@cache
def plug_ins() -> tuple[dict[str, type[Stage]], dict[str, str]]:
    """The stages of other packages by name, and why others of them cannot be loaded."""
    found: dict[str, type[Stage]] = {}
    broken: dict[str, str] = {}
    for entry in metadata.entry_points(group=GROUP):
        try:
            found[entry.name] = _stage(entry)
        except Exception as error:  # another package's code runs here: if it fails, the other stages still work
            package = f" of the package {entry.dist.name} {entry.dist.version}" if entry.dist else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            broken[entry.name] = f"entry point {entry.value!r}{package}: {reason}"
    return found, broken


def _stage(entry: metadata.EntryPoint) -> type[Stage]:
    kind = entry.load()
    if not (isinstance(kind, type) and issubclass(kind, Stage)):
        raise TypeError(f"expected a subclass of {Stage.__module__}.{Stage.__name__}, found {kind!r}")
    return kind
