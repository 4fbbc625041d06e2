"""Quantizing all layers, linear by linear as the tokens come to them; a layer is on disk before the next begins."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoglm_compress.architecture import Quantization
from autoglm_compress.architecture.quantization import AWQ
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.checkpoint.quantized_format import FORMATS
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.errors import UserError
from autoglm_compress.forward.hidden_states import HiddenStates, remaining_layers
from autoglm_compress.forward.one_layer_model import OneLayerModel, fast_dtype
from autoglm_compress.progress import Advance
from autoglm_compress.quantization.input_statistics import InputStatistics
from autoglm_compress.quantization.layer_quantizer import LayerQuantizer, QuantizedLayer
from autoglm_compress.quantization.smoothing import Pair, smoothing_pairs
from autoglm_compress.quantization.stepwise_layer import KeptActivations, LayerInParts
from autoglm_compress.runtime import Runtime


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

    def write(self, layer: int, quantized: QuantizedLayer) -> None:
        """Write a layer."""
        prefix = self.source.family.layer_prefix(layer)
        schemes, layout = self.quantization.in_layer(prefix), FORMATS[self.quantization.format]
        unit = {}
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
        """The decisions for a layer, also when it was a run since killed that took them."""
        return json.loads(self._decisions_file(layer).read_text(encoding="utf-8"))

    def _decisions_file(self, layer: int) -> Path:
        return self.work / f"decisions-{layer:05d}.json"


class QuantizingWalk:
    """Takes calibration tokens through all layers, and quantizes each linear before its outputs are computed.

    So every linear is fitted to what the quantized ones before it give, those of its own layer included. Where several
    processes walk, the first quantizes, for the inputs that all have measured, and the others take its weights.

    Args:
        writer: of the layers.
        batches: this process's token ids [batch, length].
        error_feedback: whether what rounding a feature does is made up for by those after it.
        runtime: where layers run, and which processes walk.
    """

    def __init__(
        self,
        writer: LayerWriter,
        batches: list[torch.Tensor],
        *,
        error_feedback: bool,
        runtime: Runtime,
    ) -> None:
        self.writer = writer
        self.source = writer.source
        self.batches = batches
        self.error_feedback = error_feedback
        self.device, self.progress, self.processes = runtime.device, runtime.progress, runtime.processes
        self.pairs = smoothing_pairs(self.source.shape)
        dtype = fast_dtype(self.source, runtime.device)
        self.states = HiddenStates(batches, self.source.shape.hidden_size, dtype, writer.work, runtime.processes)
        self.model = OneLayerModel(self.source, runtime.device, dtype)

    @torch.no_grad()
    def run(self) -> None:
        """Walk, from the layer that a run since killed had reached.

        Raises:
            UserError: there were NaN or infinite inputs.
        """
        layers, tokens = self.source.shape.num_hidden_layers, sum(batch.numel() for batch in self.batches)
        total, reached = layers * tokens, self.states.layers_done * tokens
        with self.progress.task("quantize", total=total, unit="layer-tokens", reached=reached) as advance:
            for layer in remaining_layers([self.states], layers, lambda: self.states.embed(self.batches, self.source)):
                self._pass_layer(layer, advance)

    def _pass_layer(self, layer: int, advance: Advance) -> None:
        module, run = self.model.load(layer)
        kept = KeptActivations(self.states.folder) if self.device.type == "cpu" else None
        parts = LayerInParts(module, run, self.states, self.source.family, kept)
        quantizer = self._quantizer(layer, module)
        for pair in self.pairs:
            inputs = self._measure(layer, module, pair, parts, advance)
            readers = {reader: module.get_submodule(reader) for reader in pair.readers}
            if quantizer:
                for linear in readers.values():
                    linear.weight = None  # so that it does not stay in memory as it was
                for reader, weight in quantizer.quantize(pair, inputs).items():
                    readers[reader].weight = nn.Parameter(weight, requires_grad=False)
            del inputs
            for reader, linear in readers.items():
                self.processes.copy_first(linear.weight)
                parts.settle(reader)
        if quantizer:
            self.writer.write(layer, quantizer.result())
        if layer + 1 < self.source.shape.num_hidden_layers:
            parts.compute_outputs()

    def _quantizer(self, layer: int, module: nn.Module) -> LayerQuantizer | None:
        """What quantizes a layer, in the process that does."""
        if not self.processes.is_first:
            return None
        return LayerQuantizer(
            {name: parameter.detach() for name, parameter in module.named_parameters()},
            self.writer.quantization.in_layer(self.source.family.layer_prefix(layer)),
            stored_dtypes(self.source, layer),
            self.writer.scale_dtype,
            error_feedback=self.error_feedback,
        )

    def _measure(
        self, layer: int, module: nn.Module, pair: Pair, parts: LayerInParts, advance: Advance
    ) -> InputStatistics:
        """What the readers of a pair read, in all processes."""
        reader = module.get_submodule(pair.readers[0])
        found = InputStatistics(reader.in_features, reader.weight.device)
        for inputs in parts.inputs_of(pair.readers[0]):
            found.add(inputs)
            advance(inputs.shape[0] * inputs.shape[1] / len(self.pairs))
        found.add_up(self.processes)
        if not found.finite:
            raise UserError(
                f"{self.source.folder}: layer {layer}: the inputs of {', '.join(pair.readers)} are NaN or infinite "
                f"for some calibration tokens: the model overflows in {self.source.dtype} or its weights are damaged."
            )
        return found


def stored_dtypes(source: Checkpoint, layer: int) -> Mapping[str, torch.dtype]:
    """The dtype of each of a layer's tensors in the checkpoint, by their names relative to the layer."""
    prefix = source.family.layer_prefix(layer)
    return {name: source.infos[prefix + name].dtype for name in source.shape.layer_tensors()}
