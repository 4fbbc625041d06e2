"""Writing a quantized checkpoint: its layers one by one, and the tensors outside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import Quantization
from autoglm_compress.architecture.quantization import AWQ
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.checkpoint.quantized_format import FORMATS
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.quantization.grid import grid_for
from autoglm_compress.quantization.layer_quantizer import QuantizedLayer
from autoglm_compress.slices import row_slices


@dataclass(frozen=True)
class LayerWriter:
    """Writes quantized layers as units of the target, and the decisions to a folder that survives a kill."""

    source: Checkpoint
    target: CheckpointWriter
    quantization: Quantization
    work: Path

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in."""
        return torch.float16 if self.quantization.format == AWQ else self.source.dtype

    @property
    def all_written(self) -> bool:
        """Whether all layers are in the target."""
        layers = range(self.source.shape.num_hidden_layers)
        return all(self.target.has(1 + layer) for layer in layers)

    def write(self, layer: int, quantized: QuantizedLayer) -> None:
        """Write a layer."""
        prefix = self.source.family.layer_prefix(layer)
        schemes, layout = self.quantization.in_layer(prefix), FORMATS[self.quantization.format]
        unit: dict[str, torch.Tensor] = {}
        for name, dtype in stored_dtypes(self.source, layer).items():
            module = name.removesuffix(".weight")
            if linear := quantized.linears.get(module):
                unit |= layout.pack(
                    prefix + module, schemes[module], linear.integers, linear.grid.scales, linear.grid.zeros
                )
            else:
                unit[prefix + name] = quantized.others[name].to(dtype)
        write_json(self._decisions_file(layer), quantized.decisions)
        self.target.write(1 + layer, {name: tensor.cpu() for name, tensor in unit.items()})

    def decisions(self, layer: int) -> dict[str, Any]:
        """The decisions for a layer, including those of an earlier, killed run."""
        return json.loads(self._decisions_file(layer).read_text(encoding="utf-8"))

    def _decisions_file(self, layer: int) -> Path:
        return self.work / f"decisions-{layer:05d}.json"


def write_outside(source: Checkpoint, target: CheckpointWriter, quantization: Quantization) -> None:
    """Write the tensors before and after the layers. The head is rounded if it has a scheme."""
    family, last = source.family, source.shape.num_hidden_layers + 1
    if not target.has(0):
        target.write(0, {family.embedding: source.read(family.embedding)})
    if target.has(last):
        return
    unit = {name: source.read(name) for name in source.shape.model_tensors() if name != family.embedding}
    if family.roles.head in quantization.schemes:
        unit |= _rounded(family.roles.head, unit.pop(family.head), quantization, source.dtype)
    target.write(last, unit)


def tower_tensor(source: Checkpoint, quantization: Quantization, name: str) -> dict[str, torch.Tensor]:
    """What is stored for a tensor of a kept tower: itself, or integers and scales where its linear has a scheme."""
    module, weight = name.removesuffix(".weight"), source.read(name)
    if module == name or module not in quantization.towers:
        return {name: weight}
    return _rounded(module, weight, quantization, source.dtype)


def _rounded(
    name: str, weight: torch.Tensor, quantization: Quantization, scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Round the weight [out, in] of a head or of a tower's linear to the nearest values and pack it, by rows."""
    scheme = quantization.towers.get(name) or quantization.schemes[name]
    parts = [grid_for(weight[rows].float(), scheme, scale_dtype) for rows in row_slices(len(weight))]
    integers = [grid.integers(weight[rows].float()) for grid, rows in zip(parts, row_slices(len(weight)), strict=True)]
    scales = torch.cat([grid.scales for grid in parts])
    return FORMATS[quantization.format].pack(name, scheme, torch.cat(integers), scales, None)


def stored_dtypes(source: Checkpoint, layer: int) -> Mapping[str, torch.dtype]:
    """The dtype of each of a layer's tensors in the checkpoint, by their names relative to the layer."""
    prefix = source.family.layer_prefix(layer)
    return {name: source.dtype_of(prefix + name) for name in source.shape.layer_tensors(layer)}
