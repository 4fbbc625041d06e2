"""Quantizing all layers: each on inputs from the quantized layers before it, and on disk before the next begins."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from autoglm_compress.architecture import Quantization
from autoglm_compress.architecture.quantization import AWQ
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.checkpoint.quantized_format import FORMATS
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.errors import UserError
from autoglm_compress.processes import Processes
from autoglm_compress.quantization.input_statistics import InputStatistics
from autoglm_compress.quantization.layer import QuantizedLayer, quantize_layer
from autoglm_compress.quantization.smoothing import Pair, smoothing_pairs


@dataclass(frozen=True)
class LayerWriter:
    """Writes quantized layers as units of the target, and the decisions taken in a folder that outlasts a kill.

    Only the first process has a target, and writes.
    """

    source: Checkpoint
    target: CheckpointWriter | None
    quantization: Quantization
    work: Path

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in."""
        return torch.float16 if self.quantization.format == AWQ else self.source.dtype

    def write(self, layer: int, quantized: QuantizedLayer) -> dict[str, torch.Tensor]:
        """Write a layer.

        Returns:
            Its tensors as an engine will compute with them, by names relative to the layer.
        """
        prefix = self.source.family.layer_prefix(layer)
        schemes, layout = self.quantization.in_layer(prefix), FORMATS[self.quantization.format]
        unit, effective = {}, {}
        for name, dtype in stored_dtypes(self.source, layer).items():
            linear = quantized.linears.get(name.removesuffix(".weight"))
            if linear is None:
                effective[name] = unit[prefix + name] = quantized.others[name].to(dtype)
                continue
            module, grid = name.removesuffix(".weight"), linear.grid
            unit |= layout.pack(prefix + module, schemes[module], linear.integers, grid.scales, grid.zeros)
            effective[name] = linear.values(self.scale_dtype)
        write_json(self._decisions_file(layer), quantized.decisions)
        self.target.write(1 + layer, {name: tensor.cpu() for name, tensor in unit.items()})
        return effective

    def decisions(self, layer: int) -> dict[str, Any]:
        """The decisions for a layer, also when it was a run since killed that took them."""
        return json.loads(self._decisions_file(layer).read_text(encoding="utf-8"))

    def _decisions_file(self, layer: int) -> Path:
        return self.work / f"decisions-{layer:05d}.json"


@dataclass
class Listener:
    """Collects what the linears of a layer read, as hooks of its modules."""

    source: Checkpoint
    processes: Processes
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The smoothing pairs of a layer."""
        return smoothing_pairs(self.source.shape)

    def enter(self, module: nn.Module) -> None:
        """Listen to the inputs that each pair's readers share."""
        for pair in self.pairs:
            reader = module.get_submodule(pair.readers[0])
            statistics = InputStatistics(reader.in_features, reader.weight.device)
            self.inputs[pair.producer] = statistics
            hook = lambda _, inputs, statistics=statistics: statistics.add(inputs[0])  # noqa: E731
            self.hooks.append(reader.register_forward_pre_hook(hook))

    def leave(self, layer: int) -> dict[str, InputStatistics]:
        """Stop listening.

        Returns:
            What all processes heard, by the producer of each pair.

        Raises:
            UserError: there were NaN or infinite inputs.
        """
        while self.hooks:
            self.hooks.pop().remove()
        for statistics in self.inputs.values():
            statistics.add_up(self.processes)
        for pair in self.pairs:
            if not self.inputs[pair.producer].finite:
                raise UserError(
                    f"{self.source.folder}: layer {layer}: the inputs of {', '.join(pair.readers)} are NaN or infinite "
                    f"for some calibration tokens: the model overflows in {self.source.dtype} or its weights are "
                    "damaged."
                )
        return self.inputs


class QuantizingVisitor:
    """The walk's visitor: collects the inputs of a layer's linears, then quantizes, writes and replaces them.

    The first process does the latter, for the inputs that all collected, and the others take its weights.
    """

    def __init__(self, writer: LayerWriter, error_feedback: bool, processes: Processes) -> None:
        self.writer = writer
        self.error_feedback = error_feedback
        self.processes = processes
        self.listener = Listener(writer.source, processes)

    def enter(self, layer: int, module: nn.Module) -> None:
        """Listen to a layer."""
        self.listener.enter(module)

    def leave(self, layer: int, module: nn.Module) -> bool:
        """Quantize the layer; the tokens are to go through it again, if another layer comes after it."""
        inputs = self.listener.leave(layer)
        if self.processes.is_first:
            self._quantize(layer, module, inputs)
        for parameter in module.parameters():
            self.processes.copy_first(parameter)
        return layer + 1 < self.writer.source.shape.num_hidden_layers

    def _quantize(self, layer: int, module: nn.Module, inputs: dict[str, InputStatistics]) -> None:
        source = self.writer.source
        weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
        compute_dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        module.to("meta")  # so that a weight that was scaled does not stay in memory as it was
        quantized = quantize_layer(
            weights,
            inputs,
            self.listener.pairs,
            self.writer.quantization.in_layer(source.family.layer_prefix(layer)),
            stored_dtypes(source, layer),
            self.writer.scale_dtype,
            error_feedback=self.error_feedback,
        )
        effective = self.writer.write(layer, quantized)
        module.load_state_dict({name: w.to(compute_dtypes[name]) for name, w in effective.items()}, assign=True)


def stored_dtypes(source: Checkpoint, layer: int) -> Mapping[str, torch.dtype]:
    """The dtype of each of a layer's tensors in the checkpoint, by their names relative to the layer."""
    prefix = source.family.layer_prefix(layer)
    return {name: source.infos[prefix + name].dtype for name in source.shape.layer_tensors()}
