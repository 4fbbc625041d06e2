"""Compress large language models, layer by layer, into ones that fit a phone.

    >>> from autoglm_compress import run
    >>> result = run("demo")

See `docs/python.md` for all functions. Each is imported when it is first asked for: torch takes seconds.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_compress.api.comparing import compare
    from autoglm_compress.api.exporting import export_checkpoint
    from autoglm_compress.api.measuring import evaluate
    from autoglm_compress.api.publishing import push
    from autoglm_compress.api.running import plan, run
    from autoglm_compress.checkpoint import Checkpoint
    from autoglm_compress.errors import UserError
    from autoglm_compress.recipe import load_recipe

    __version__: str

__all__ = [
    "Checkpoint",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "export_checkpoint",
    "load_recipe",
    "plan",
    "push",
    "run",
]
_ROOMS = {
    "Checkpoint": "checkpoint",
    "UserError": "errors",
    "compare": "api.comparing",
    "evaluate": "api.measuring",
    "export_checkpoint": "api.exporting",
    "load_recipe": "recipe",
    "plan": "api.running",
    "push": "api.publishing",
    "run": "api.running",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("autoglm-compress")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # What the command line sets for its process, before torch is imported.
    import_module(f"{__name__}.threads").sleep_soon()
    import_module(f"{__name__}.memory").keep_freed_memory()
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
