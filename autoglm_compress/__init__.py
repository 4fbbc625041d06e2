"""Compress large language models, layer by layer, into ones that fit a phone.

    >>> from autoglm_compress import run
    >>> result = run("demo")

See `docs/python.md` for all functions. They are imported when first asked for: torch takes seconds.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_compress.api import Checkpoint, UserError, compare, evaluate, load_recipe, plan, run

    __version__: str

__all__ = ["Checkpoint", "UserError", "__version__", "compare", "evaluate", "load_recipe", "plan", "run"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("autoglm-compress")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("autoglm_compress.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
