"""The tensors of a GGUF file: what each is called, what type it has, and how it is made from the checkpoint's."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch

from autoglm_compress.architecture import ModelShape, Scheme
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.eight_bits import require_blocks
from autoglm_compress.export.exactness import Exactness, Rounding, relative_error
from autoglm_compress.export.gguf_blocks import BLOCK, block_type, pack_blocks
from autoglm_compress.export.gguf_families import engine_family, row_order
from autoglm_compress.slices import row_slices

BLOCK_BYTES = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2, "Q4_1": 4 + BLOCK // 2}
"""Bytes of 32 values, by ggml's names of types."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: ours and llama.cpp's name for it, its shape [out, in] or [n], and ggml's name of its type.

    Its rows are those of the checkpoint's tensor from `first` on.
    """

    name: str
    engine_name: str
    shape: tuple[int, ...]
    type: str
    first: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] * BLOCK_BYTES[self.type] // BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def rows(self) -> slice:
        """Its rows in the checkpoint's tensor."""
        return slice(self.first, self.first + self.shape[0])


def stored_tensors(shape: ModelShape, embedding_bits: int | None) -> list[StoredTensor]:
    """The tensors of a model in the order of the file, all but RoPE's factors.

    Args:
        shape: the model's, without a `shape_problem`.
        embedding_bits: 8 to round a 16-bit embedding and a 16-bit head to Q8_0, None for what they are.

    Raises:
        ValueError: GGUF cannot hold one of them; the message names it. EndsError if it is an end that cannot be in 8
            bits.
    """
    ends = (shape.family.embedding, shape.family.head)
    wide = "F32" if shape.dtype == "float32" else "F16"
    found = []
    for name, size in shape.tensors():
        scheme = shape.schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        try:
            kind = _type_of(size, scheme, embedding_bits if name in ends else None, wide)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from None
        found.append(StoredTensor(name, name, size, kind))
    return list(_named(_split(found, shape), shape))


def _type_of(size: tuple[int, ...], scheme: Scheme | None, bits: int | None, wide: str) -> str:
    if len(size) == 1:
        return "F32"  # llama.cpp adds and multiplies vectors in fp32 alone
    if scheme is not None:
        return block_type(scheme, size[1])
    if bits == 8:
        require_blocks(size[1])
        return "Q8_0"
    return wide


def _split(tensors: Iterable[StoredTensor], shape: ModelShape) -> Iterator[StoredTensor]:
    """The tensors with gate and up each by itself, where llama.cpp has them so."""
    fused = shape.family.roles.ffn.gate_up if engine_family(shape).splits else None
    for tensor in tensors:
        if fused is None or shape.family.place(tensor.name).name != f"{fused}.weight":
            yield tensor
            continue
        half = (shape.intermediate_size, tensor.shape[1])
        for number, part in enumerate(("gate_proj", "up_proj")):
            name = tensor.name.replace("gate_up_proj", part)
            yield replace(tensor, engine_name=name, shape=half, first=number * half[0])


def _named(tensors: Iterable[StoredTensor], shape: ModelShape) -> Iterator[StoredTensor]:
    """The tensors with the names that the `gguf` package has for those of `transformers`."""
    import gguf

    architecture = engine_family(shape).architecture
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, shape.num_hidden_layers)
    for tensor in tensors:
        name = names.get_name(_name_in_text_model(tensor, shape), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{tensor.name}: the gguf package has no name for it in {architecture}")
        yield replace(tensor, engine_name=name)


def _name_in_text_model(tensor: StoredTensor, shape: ModelShape) -> str:
    """What a model that is a text tower alone calls a tensor."""
    if tensor.name == shape.family.head:
        return "lm_head.weight"
    return f"model.{shape.family.within_text(tensor.engine_name)}"


def make_tensor(checkpoint: Checkpoint, tensor: StoredTensor, exactness: Exactness) -> np.ndarray:
    """A tensor's bytes as the file has them, uint8 [out, bytes of a row], or fp32 [n].

    Raises:
        UserError: the checkpoint's tensor is damaged, or the type cannot hold it.
    """
    module = tensor.name.rpartition(".")[0]
    order = row_order(checkpoint.shape, checkpoint.model_config, module)
    schemes = checkpoint.shape.schemes
    if len(tensor.shape) > 1 and module in schemes and tensor.name not in checkpoint.infos:
        integers, scales, zeros = checkpoint.read_integers(module)
        zeros = None if zeros is None else zeros[tensor.rows]
        packed = pack_blocks(schemes[module], integers[tensor.rows], scales[tensor.rows], zeros, order)
        for kind, rounding in packed.roundings.items():
            exactness.add(tensor.name, kind, rounding)
        return packed.data
    values = checkpoint.read(tensor.name)[tensor.rows]
    if len(tensor.shape) == 1:
        return (values if order is None else values[order]).float().numpy()
    return plain_matrix(tensor, values, order, exactness)


def plain_matrix(
    tensor: StoredTensor, values: torch.Tensor, order: torch.Tensor | None, exactness: Exactness
) -> np.ndarray:
    """The bytes of a matrix [out, in] of plain numbers, uint8 [out, bytes of a row], a slice of rows at a time.

    Args:
        tensor: what it is in the file; of a convolution all dimensions but the first are `in`.
        values: the numbers.
        order: of the rows, as `row_order` gives it.
        exactness: counts what is rounded.

    Raises:
        UserError: the type cannot hold it.
    """
    from gguf import GGMLQuantizationType, quantize

    found = np.empty((tensor.shape[0], tensor.nbytes // tensor.shape[0]), dtype=np.uint8)
    changed, difference, size = 0, 0.0, 0.0
    for part in row_slices(len(values)):
        chosen = values[part if order is None else order[part]]
        if tensor.type == "F16" and chosen.dtype != torch.float16:
            exact, chosen = chosen, chosen.to(torch.float16)
            off = chosen.to(exact.dtype) != exact  # what fp16 keeps of a number of bf16, bf16 has too
            if bool(off.any()):
                changed += int(off.sum())
                difference += float((chosen[off].double() - exact[off].double()).square().sum())
            size += float(torch.linalg.vector_norm(exact, dtype=torch.float32)) ** 2
        numbers = chosen.numpy() if chosen.dtype == torch.float16 else chosen.float().numpy()
        found[part] = quantize(numbers, GGMLQuantizationType[tensor.type]).view(np.uint8)
    if tensor.type == "F16":
        exactness.add(tensor.name, "values", Rounding(values.numel(), changed, relative_error(difference, size)))
    return found
