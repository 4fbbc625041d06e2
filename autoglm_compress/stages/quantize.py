"""Quantize the decoder layers' linears to 4 or 8 bits."""

import json
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from autoglm_compress.architecture import ModelShape, Quantization
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.compressed_tensors_format import pack, quantization_config
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.errors import UserError
from autoglm_compress.quantization.awq import Choice, InputStatistics, search_scale
from autoglm_compress.quantization.rounding import dequantize, quantize_symmetric
from autoglm_compress.quantization.smoothing import Pair, fold, smoothing_pairs
from autoglm_compress.reconstruction.walk import walk
from autoglm_compress.stages.base import PlanError, Stage, StageContext

SMALLEST_GROUP = 32


class Quantize(Stage):
    """Round the decoder layers' linears to integers with a scale per group of input features.

    `awq` (Lin et al. 2023) scales channels before rounding so that those which carry much are rounded finely;
    `round_to_nearest` does not look at activations. Embedding, head, norms and biases keep their dtype. The result is
    symmetric compressed-tensors `pack-quantized`, which transformers and vLLM load.
    """

    stage: Literal["quantize"]
    method: Literal["awq", "round_to_nearest"] = "awq"
    bits: Literal[4, 8]
    group_size: Literal[32, 64, 128, -1] = 128

    makes_quantized = True

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations."""
        return self.method == "awq"

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with quantized linears; a linear that the group size does not divide gets a smaller one."""
        if shape.quantization is not None:
            message = "a quantized checkpoint cannot be quantized again: set `from:` to a stage that is not quantized"
            raise PlanError("stage", message)
        sizes = {linear: self._group_size(linear, features) for linear, features in _in_features(shape)}
        return replace(shape, quantization=Quantization(self.bits, tuple(sorted(sizes.items()))))

    def _group_size(self, linear: str, features: int) -> int:
        size = self.group_size
        while size > SMALLEST_GROUP and features % size:
            size //= 2
        if size != -1 and features % size:
            raise PlanError(
                "group_size",
                f"{self.group_size}: {linear} has {features} input features, not a multiple of {SMALLEST_GROUP}; "
                f"use -1 (one scale per output channel), or a size that is a multiple of {SMALLEST_GROUP}",
            )
        return size

    def working_memory(self, shape: ModelShape) -> int:
        """Gram matrices of a layer's inputs, and a linear before and after rounding, in fp32."""
        grams = 2 * shape.hidden_size**2 + shape.axis("query") ** 2 + shape.intermediate_size**2
        widest = max(prod(tensor) for tensor in shape.layer_tensors().values())
        return 4 * (grams + 2 * widest)

    def scratch_bytes(self, shape: ModelShape, source: ModelShape, tokens: int) -> int:
        """The walk's two buffers, fp32."""
        return 2 * 4 * tokens * shape.hidden_size if self.uses_calibration else 0

    def warnings(self, shape: ModelShape) -> list[str]:
        """The linears that get a smaller group than was asked for."""
        planned = self.plan(shape).quantization
        return [
            f"{linear}: groups of {planned.group_size(linear)}, as its {features} input features are not a multiple "
            f"of {self.group_size}"
            for linear, features in _in_features(shape)
            if planned.group_size(linear) != self.group_size
        ]

    def run(self, context: StageContext) -> None:
        """Quantize layer by layer, each on inputs from the quantized layers before it, and write the checkpoint."""
        source, target = context.source, context.target
        layers = source.shape.num_hidden_layers
        writer = LayerWriter(context)
        outside = {name: name == source.family.embedding for name in source.shape.model_tensors()}
        for unit, is_first in ((0, True), (layers + 1, False)):
            if not target.has(unit):
                target.write(unit, {name: source.read(name) for name, first in outside.items() if first is is_first})
        if not all(target.has(1 + layer) for layer in range(layers)):
            self._run_layers(context, writer)
        context.decisions = {"layers": [writer.decisions(layer) for layer in range(layers)]}
        quantization = quantization_config(context.shape.quantization)
        target.finish(dict(source.config, quantization_config=quantization), like=source)

    def _run_layers(self, context: StageContext, writer: "LayerWriter") -> None:
        source = context.source
        if self.method == "awq":
            walk(
                source,
                context.calibration_batches(),
                AwqVisitor(writer, source, context.shape.quantization),
                device=context.device,
                progress=context.progress,
                title="quantize",
                folder=context.work,
            )
            return
        layers = source.shape.num_hidden_layers
        with context.progress.task("quantize", total=layers, unit="layers") as advance:
            for layer in range(layers):
                if not context.target.has(1 + layer):
                    weights = source.read_layer(layer)
                    writer.write(layer, {name: w.to(context.device).float() for name, w in weights.items()}, {})
                advance(1)


class LayerWriter:
    """Rounds a layer's linears and writes the layer's unit of the target, and the decisions taken beside it."""

    def __init__(self, context: StageContext) -> None:
        self.source = context.source
        self.target = context.target
        self.work = context.work
        self.quantization: Quantization = context.shape.quantization

    def write(self, layer: int, weights: dict[str, torch.Tensor], decisions: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Quantize and write a layer's tensors, given in fp32 by their names relative to the layer.

        Returns:
            The tensors as an engine will compute with them, in the checkpoint's dtypes.
        """
        prefix = self.source.family.layer_prefix(layer)
        dtypes = stored_dtypes(self.source, layer)
        linears = {f"{linear}.weight" for linear in self.source.family.layer_linears}
        unit, effective, errors = {}, {}, {}
        for name, weight in weights.items():
            if name not in linears:
                effective[name] = unit[prefix + name] = weight.to(dtypes[name])
                continue
            linear = name.removesuffix(".weight")
            bits, size = self.quantization.bits, self.quantization.group_size(linear)
            integers, scales = quantize_symmetric(weight, bits, size, self.source.dtype)
            unit |= pack(prefix + linear, integers, scales, bits)
            effective[name] = dequantize(integers, scales, self.source.dtype)
            errors[linear] = _compact((effective[name] - weight).norm() / weight.norm().clamp(min=1e-30))
        write_json(self._decisions_file(layer), {"weight_error": errors} | decisions)
        self.target.write(1 + layer, {name: tensor.cpu() for name, tensor in unit.items()})
        return effective

    def decisions(self, layer: int) -> dict[str, Any]:
        """The decisions for a layer, also when it was a run since killed that took them."""
        return json.loads(self._decisions_file(layer).read_text(encoding="utf-8"))

    def _decisions_file(self, layer: int) -> Path:
        return self.work / f"decisions-{layer:05d}.json"


class AwqVisitor:
    """The walk's visitor: collects the inputs of a layer's linears, then scales, rounds, writes and replaces them."""

    def __init__(self, writer: LayerWriter, source: Checkpoint, quantization: Quantization) -> None:
        self.writer = writer
        self.source = source
        self.quantization = quantization
        self.pairs = smoothing_pairs(source.shape)
        self.inputs: dict[str, InputStatistics] = {}
        self.hooks: list[RemovableHandle] = []

    def enter(self, layer: int, module: nn.Module) -> None:
        """Listen to the inputs that each pair's readers share."""
        for pair in self.pairs:
            reader = module.get_submodule(pair.readers[0])
            statistics = InputStatistics(reader.in_features, reader.weight.device)
            self.inputs[pair.producer] = statistics
            hook = lambda _, inputs, statistics=statistics: statistics.add(inputs[0])  # noqa: E731
            self.hooks.append(reader.register_forward_pre_hook(hook))

    def leave(self, layer: int, module: nn.Module) -> bool:
        """Quantize the layer; the tokens are to go through it again."""
        while self.hooks:
            self.hooks.pop().remove()
        weights = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
        compute_dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        module.to("meta")  # so that a weight that was scaled does not stay in memory as it was
        dtypes = stored_dtypes(self.source, layer)
        decisions = {}
        for pair in self.pairs:
            choice = self._search(layer, weights, pair)
            weights |= fold(weights, pair, choice.candidate.scale, dtypes)
            decisions[pair.producer] = _summary(choice)
        effective = self.writer.write(layer, weights, {"pairs": decisions})
        module.load_state_dict({name: w.to(compute_dtypes[name]) for name, w in effective.items()}, assign=True)
        return True

    def _search(self, layer: int, weights: dict[str, torch.Tensor], pair: Pair) -> Choice:
        inputs = self.inputs.pop(pair.producer)
        if not inputs.finite:
            raise UserError(
                f"{self.source.folder}: layer {layer}: the inputs of {', '.join(pair.readers)} are NaN or infinite for "
                f"some calibration tokens: the model overflows in {self.source.dtype} or its weights are damaged."
            )
        return search_scale(
            [weights[f"{reader}.weight"] for reader in pair.readers],
            inputs,
            pair,
            bits=self.quantization.bits,
            group_size=self.quantization.group_size(pair.readers[0]),
            dtype=self.source.dtype,
        )


def stored_dtypes(source: Checkpoint, layer: int) -> dict[str, torch.dtype]:
    """The dtype of each of a layer's tensors in the checkpoint, by their names relative to the layer."""
    prefix = source.family.layer_prefix(layer)
    return {name: source.infos[prefix + name].dtype for name in source.shape.layer_tensors()}


def _in_features(shape: ModelShape) -> Iterable[tuple[str, int]]:
    tensors = shape.layer_tensors()
    return [(linear, tensors[f"{linear}.weight"][1]) for linear in shape.family.layer_linears]


def _summary(choice: Choice) -> dict[str, Any]:
    return {
        "alpha": choice.candidate.alpha,
        "weight_term": choice.candidate.weight_term,
        "error_rounding": _compact(choice.error_rounding),
        "error": _compact(choice.error),
        "error_ratio": _compact(choice.error / choice.error_rounding if choice.error_rounding else 1.0),
    }


def _compact(value: torch.Tensor | float) -> float:
    return float(f"{float(value):.4g}")
