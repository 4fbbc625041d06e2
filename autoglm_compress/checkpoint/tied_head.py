"""A stored head although config.json ties head and embedding: transformers uses the stored one."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from safetensors import safe_open

from autoglm_compress.architecture import Family
from autoglm_compress.checkpoint.model_config import is_tied
from autoglm_compress.checkpoint.safetensors_header import TensorInfo
from autoglm_compress.checkpoint.weight_files import stamp

ELEMENTS_AT_ONCE = 1 << 24


def has_own_head(infos: Mapping[str, TensorInfo], family: Family, config: Any) -> bool:
    """Whether a checkpoint's head differs from its embedding although its config ties the two.

    Args:
        infos: the tensors of the weight files.
        family: the checkpoint's.
        config: its whole `transformers` config object.
    """
    embedding, head = infos.get(family.embedding), infos.get(family.head)
    if not is_tied(config) or embedding is None or head is None:
        return False
    stamps = tuple(stamp(info.file) for info in (embedding, head))
    return not _equal(embedding, head, stamps)


@cache
def _equal(first: TensorInfo, second: TensorInfo, stamps: tuple[tuple[int, int], ...]) -> bool:
    """Whether two stored matrices have the same values, read a few rows at a time.

    The answer is cached as long as the files keep their stamps, because a run opens a checkpoint many times.
    """
    step = max(1, ELEMENTS_AT_ONCE // first.shape[1])

    def rows(info: TensorInfo, start: int) -> torch.Tensor:
        # A handle that stayed open would keep every page ever read of its file resident.
        with safe_open(info.file, framework="pt") as file:
            return file.get_slice(info.name)[start : start + step].float()

    return first.shape == second.shape and all(
        torch.allclose(rows(first, start), rows(second, start), rtol=0, atol=0, equal_nan=True)
        for start in range(0, first.shape[0], step)
    )
