"""Attention that reads few of the cached tokens, and a KV cache that is allocated ahead.

    >>> from autoglm_compress.attention import SparseAttention
    >>> attention = SparseAttention.load("runs/demo/05-attention/attention.json")
    >>> cache = attention.apply(model)
    >>> model.generate(**inputs, past_key_values=cache)

Usable without the rest of the package. Names are imported when they are first asked for: `transformers` takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_compress.attention.cache import PreallocatedCache
    from autoglm_compress.attention.settings import SparseAttention

__all__ = ["PreallocatedCache", "SparseAttention"]
_MODULES = {"PreallocatedCache": "cache", "SparseAttention": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
