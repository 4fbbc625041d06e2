"""The trained parameters of a student, and the checkpoint's tensors made from them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.healing.options import Lora


def choose_trained(model: nn.Module, linears: tuple[str, ...], lora: Lora | None, quantized: bool, seed: int) -> None:
    """Freeze the other parameters in place: none, all but adapters, or all but scales, norms and biases.

    Adapters are added to the layers' linears, in fp32, and start at zero.
    """
    if lora is not None:
        from peft import LoraConfig, inject_adapter_in_model

        names = [linear.rsplit(".", 1)[-1] for linear in linears]
        torch.manual_seed(seed)
        model.requires_grad_(False)
        scale: Any = lora.alpha  # a float, as the paper has it; peft's types say int, its code divides by the rank
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=scale, target_modules=names), model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # peft gives them the dtype of their linears
    elif quantized:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.dim() == 1 or name.endswith(".gains"))


def healed(
    names: list[str], source: Checkpoint, trained: Mapping[str, torch.Tensor], lora: Lora | None
) -> dict[str, torch.Tensor]:
    """Weights of the healed checkpoint as they are stored, in the dtypes and the quantization of the source.

    Args:
        names: the weights wanted, by their names in the checkpoint.
        source: the checkpoint that was healed.
        trained: the parameters of a `Student` that were trained.
        lora: the adapters' options, if there are any.
    """
    stored: dict[str, torch.Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if name not in source.infos:
            stored |= _quantized(module, source, trained.get(f"model.{module}.gains"))
            continue
        weight = trained.get(f"model.{name}")
        if lora is not None and f"model.{module}.lora_A.default.weight" in trained:
            down, up = (trained[f"model.{module}.lora_{side}.default.weight"] for side in "AB")
            weight = source.read(name).float() + lora.alpha / lora.rank * (up @ down)
        stored[name] = source.read(name) if weight is None else weight.to(source.infos[name].dtype)
    return stored


def _quantized(module: str, source: Checkpoint, gains: torch.Tensor | None) -> dict[str, torch.Tensor]:
    integers, scales, zeros = source.read_integers(module)
    if gains is not None:
        scales = (scales.float() * gains).to(scales.dtype)
    layout, scheme = source.packing_of(module)
    return layout.pack(module, scheme, integers, scales, zeros)
