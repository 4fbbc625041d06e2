"""A KV cache for `transformers` that is allocated ahead."""

from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from autoglm_compress.attention.cache_layers import KVBits, PreallocatedLayer, PreallocatedSlidingLayer


class PreallocatedCache(Cache):
    """`DynamicCache` without the copy of all keys and values at every token; with `kv_bits` 8, at half of its memory.

    Layers of other kinds than full and sliding attention are those of `DynamicCache`.

    Args:
        config: the model's config.
        kv_bits: 16 for the dtype that the model computes in, 8 for INT8 with a scale per token and head.
        as_kept: whether full attention is `dynamic_sparse`, which reads integers as they are.
    """

    def __init__(self, config: Any, kv_bits: KVBits = 16, as_kept: bool = False) -> None:
        super().__init__(layers=[_replaced(layer, kv_bits, as_kept) for layer in DynamicCache(config=config).layers])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the room for tokens to come included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PreallocatedLayer))


def _replaced(layer: Any, kv_bits: KVBits, as_kept: bool) -> Any:
    """The layer that takes the place of one of `DynamicCache`; subclasses keep more than keys and values."""
    if type(layer) is DynamicLayer:
        return PreallocatedLayer(kv_bits, as_kept)
    if type(layer) is DynamicSlidingWindowLayer:
        return PreallocatedSlidingLayer(layer.sliding_window, kv_bits)
    return layer
