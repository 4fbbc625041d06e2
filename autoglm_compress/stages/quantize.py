"""Quantize the decoder layers' linears to 4 or 8 bits."""

from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from autoglm_compress.architecture import ModelShape, Quantization, Scheme
from autoglm_compress.architecture.quantization import AWQ, COMPRESSED_TENSORS, HEAD
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.quantized_format import FORMATS
from autoglm_compress.cutting.surgery import row_slices
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.agreement import agreement
from autoglm_compress.forward.one_layer_model import fast_dtype
from autoglm_compress.quantization import bit_allocation
from autoglm_compress.quantization.autoawq_backend import quantize_with_autoawq
from autoglm_compress.quantization.costs import fed_back_fan_in, quantizing_memory, quantizing_scratch
from autoglm_compress.quantization.grid import grid_for
from autoglm_compress.quantization.layer_quantizer import round_layer
from autoglm_compress.quantization.options import QuantizationOptions
from autoglm_compress.quantization.quantizing_walk import LayerWriter, QuantizingWalk
from autoglm_compress.quantization.sensitivity import divergences
from autoglm_compress.stages.base import PlanError, Stage, StageContext
from autoglm_compress.stages.needs import Needs

GROUP_SIZES = (128, 64, 32)
FEW, MANY = bit_allocation.FEW, bit_allocation.MANY


class Quantize(Stage, QuantizationOptions):
    """Round the decoder layers' linears to integers with a scale per group of input features.

    `awq` (Lin et al. 2023) scales channels before rounding so that those which carry much are rounded finely, and by
    `error_feedback` (GPTQ, Frantar et al. 2023) what rounding one input does is made up for by the next;
    `round_to_nearest` does not look at activations. `bits: auto` gives 8 bits to the linears that lose most by 4, as
    far as the `budget` goes. Embedding, norms and biases keep their dtype, and so does the head unless `head_bits` is
    8. The result is compressed-tensors `pack-quantized`, or AutoAWQ's GEMM layout with `format: awq`. Before it counts
    as done, its predictions on held-out text are compared with those before: a mean KL divergence over `max_divergence`
    nats, or predictions that are not finite, fail the stage.

    `backend: autoawq` has AutoAWQ 0.2.9 do it instead, with its own search and the whole model in memory, to compare.
    """

    stage: Literal["quantize"]

    makes_quantized = True
    accepting = frozenset({"max_divergence"})
    tokens_per_input = 1
    revision: ClassVar[int] = 3

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations."""
        return self.looks_at_activations

    @property
    def runs_in_all_processes(self) -> bool:
        """Whether there are calibration rows to share."""
        return self.method == "awq" and self.backend == "own"

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with quantized linears; with `bits: auto` the first of them have 8 bits until the run decides."""
        if shape.quantization is not None:
            message = "a quantized checkpoint cannot be quantized again: set `from:` to a stage that is not quantized"
            raise PlanError("stage", message)
        if (self.bits == "auto") is (self.budget is None):
            raise PlanError("budget", "goes with `bits: auto`, as {bytes: …} or {average_bits: …}, and with it alone")
        self._check_group_size(shape)
        self._check_format(shape)
        self._check_backend()
        quantization = self._quantization(shape)
        if self.bits != "auto":
            return replace(shape, quantization=quantization)
        groups = bit_allocation.groups_of(shape)
        sizes, left = self._budget_left(shape, quantization, groups)
        if left < 0:
            least = bit_allocation.checkpoint_bytes(shape, quantization)
            raise PlanError("budget", f"too small: with 4 bits everywhere the checkpoint has {least} bytes")
        bits = []
        for size in sizes:
            bits.append(MANY if size <= left else FEW)
            left -= size if bits[-1] == MANY else 0
        return replace(shape, quantization=bit_allocation.with_bits(quantization, groups, bits))

    def _quantization(self, shape: ModelShape) -> Quantization:
        """All linears with the bits asked for, or the fewest of `auto`."""
        symmetric = self.format == COMPRESSED_TENSORS if self.symmetric is None else self.symmetric
        scheme = Scheme(FEW if self.bits == "auto" else self.bits, self.group_size, symmetric)
        schemes = {name: scheme for name, _ in shape.linear_shapes()}
        if self.head_bits == MANY:
            schemes[HEAD] = Scheme(MANY, -1)
        return Quantization(self.format, schemes)

    def _check_group_size(self, shape: ModelShape) -> None:
        tensors = shape.layer_tensors()
        features = {linear: tensors[f"{linear}.weight"][1] for linear in shape.family.layer_linears}
        bad = {linear: columns for linear, columns in features.items() if columns % max(self.group_size, 1)}
        if bad:
            fit = [str(size) for size in GROUP_SIZES if not any(columns % size for columns in features.values())]
            linear, columns = next(iter(bad.items()))
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise PlanError(
                "group_size",
                f"{self.group_size} does not divide the {columns} input features of {linear}{others}; sizes that do "
                f"for all linears: {', '.join([*fit, '-1'])} (-1 is one scale per output)",
            )

    def _check_format(self, shape: ModelShape) -> None:
        if self.head_bits == MANY and shape.tie_word_embeddings:
            raise PlanError("head_bits", "8: no loader takes a quantized matrix that is embedding and head at once")
        if self.symmetric is False and (self.bits == "auto" or self.head_bits == MANY):
            raise PlanError(
                "symmetric",
                "false: transformers reads zero points rightly only where all linears have the same bits: not with "
                "`bits: auto` or `head_bits: 8`",
            )
        if self.format != AWQ:
            return
        if self.bits != FEW or self.symmetric or self.head_bits == MANY:
            raise PlanError("format", "awq holds 4 bits, asymmetric, and a 16-bit head: use compressed-tensors")
        if bad := [name for name, (rows, _) in shape.linear_shapes() if rows % 8]:
            raise PlanError("format", f"awq packs outputs by eights, and {bad[0]} has another number of them")

    def _check_backend(self) -> None:
        if self.backend == "own":
            return
        if self.format != AWQ or self.method != "awq":
            raise PlanError("backend", "autoawq does `method: awq` and writes `format: awq` alone")
        if find_spec("awq") is None:
            raise PlanError("backend", "autoawq is not installed: pip install 'autoglm-compress[autoawq]'")

    def _budget_left(
        self, shape: ModelShape, quantization: Quantization, groups: list[bit_allocation.Group]
    ) -> tuple[list[int], int]:
        """What more bits for each group take of the budget, and what 4 bits everywhere leave of it."""
        shapes = dict(shape.linear_shapes())
        weights = [sum(prod(shapes[name]) for name in group.linears) for group in groups]
        if self.budget.bytes is None:
            left = (self.budget.average_bits - FEW) * sum(weights)
            return [(MANY - FEW) * number for number in weights], int(left)
        left = self.budget.bytes - bit_allocation.checkpoint_bytes(shape, quantization)
        more = bit_allocation.with_bits(quantization, groups, [MANY] * len(groups))

        def stored(chosen: Quantization, group: bit_allocation.Group) -> int:
            return sum(chosen.matrix_bytes(name, shapes[name], shape.element_bytes) for name in group.linears)

        return [stored(more, group) - stored(quantization, group) for group in groups], left

    def needs(self, shape: ModelShape, source: ModelShape, tokens: int) -> Needs:
        """What the largest of its steps holds, and the states that are walked."""
        return Needs(
            memory=quantizing_memory(self, shape),
            scratch=quantizing_scratch(self, shape, tokens),
            fan_in=fed_back_fan_in(self, shape),
        )

    def warnings(self, shape: ModelShape) -> list[str]:
        """What some loaders do not take."""
        found = []
        if self.format == COMPRESSED_TENSORS and self.symmetric is False:
            found.append(
                "asymmetric compressed-tensors: vLLM loads this, transformers only with "
                "CompressedTensorsConfig(dequantize=True); `format: awq` holds zero points too"
            )
        if self.head_bits == MANY:
            found.append(
                "a quantized head: transformers loads it, vLLM since March 2026; other engines may leave it out in "
                "silence, so look at what they generate"
            )
        return found

    def run(self, context: StageContext) -> None:
        """Quantize layer by layer, each on inputs from the quantized layers before it, and write the checkpoint."""
        source, target = context.source, context.target
        layers = source.shape.num_hidden_layers
        if target is None:
            self._walk(context, LayerWriter(source, None, context.shape.quantization, context.work))
            return
        if self.bits == "auto":
            self._choose_bits(context)
        self._write_outside(context, layers)
        if self.backend == "autoawq":
            self._run_autoawq(context)
        else:
            self._run_layers(context, LayerWriter(source, target, context.shape.quantization, context.work))
        described = FORMATS[self.format].quantization_config(context.shape.quantization)
        target.finish(dict(source.config, quantization_config=described), like=source)
        self._check(context)

    def _choose_bits(self, context: StageContext) -> None:
        """Replace the planned shape's bits by those that cost least within the budget."""
        source = context.source
        quantization, groups = self._quantization(source.shape), bit_allocation.groups_of(source.shape)
        costs = divergences(
            source,
            quantization,
            groups,
            context.calibration_batches(),
            context.runtime,
            context.work / "sensitivity.json",
        )
        sizes, left = self._budget_left(source.shape, quantization, groups)
        bits = [MANY if more else FEW for more in bit_allocation.allocate(costs, sizes, left)]
        chosen = bit_allocation.with_bits(quantization, groups, bits)
        context.shape = replace(context.shape, quantization=chosen)
        context.decisions["average_bits"] = bit_allocation.average_bits(source.shape, chosen.schemes)
        context.decisions["bits"] = [
            {"linears": list(group.linears), "bits": number, "divergence_at_4_bits": float(f"{cost:.4g}")}
            for group, number, cost in zip(groups, bits, costs, strict=True)
        ]

    def _write_outside(self, context: StageContext, layers: int) -> None:
        """Write what stands before and after the layers."""
        source, target, family = context.source, context.target, context.source.family
        if not target.has(0):
            target.write(0, {family.embedding: source.read(family.embedding)})
        if target.has(layers + 1):
            return
        unit = {name: source.read(name) for name in source.shape.model_tensors() if name != family.embedding}
        if self.head_bits == MANY:
            head, scheme = unit.pop(family.head), context.shape.quantization.schemes[HEAD]
            parts = [grid_for(head[rows].float(), scheme, source.dtype) for rows in row_slices(len(head))]
            integers = [
                grid.integers(head[rows].float()) for grid, rows in zip(parts, row_slices(len(head)), strict=True)
            ]
            scales = torch.cat([grid.scales for grid in parts])
            unit |= FORMATS[self.format].pack(HEAD, scheme, torch.cat(integers), scales, None)
        target.write(layers + 1, unit)

    def _run_autoawq(self, context: StageContext) -> None:
        """Have AutoAWQ quantize the whole model, and write its layers."""
        source, target = context.source, context.target
        layers = range(source.shape.num_hidden_layers)
        if all(target.has(1 + layer) for layer in layers):
            return
        # AutoAWQ works on the CPU, whatever the run's device.
        dtype = fast_dtype(source, torch.device("cpu"))
        rows = torch.cat(context.calibration_batches())
        tensors = quantize_with_autoawq(source.folder, rows, self.group_size, dtype)
        for name, tensor in tensors.items():
            if name in source.infos:
                tensors[name] = tensor.to(source.infos[name].dtype)
        for layer in layers:
            prefix = source.family.layer_prefix(layer)
            unit = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith(prefix)}
            target.write(1 + layer, unit)

    def _run_layers(self, context: StageContext, writer: LayerWriter) -> None:
        layers = range(context.source.shape.num_hidden_layers)
        if self.method != "awq":
            self._round_layers(context, writer)
        else:
            self._walk(context, writer)
        context.decisions["layers"] = [writer.decisions(layer) for layer in layers]

    def _walk(self, context: StageContext, writer: LayerWriter) -> None:
        """Quantize layer after layer, each process with its rows, unless the first finds that all are written."""
        source, target, processes = context.source, writer.target, context.runtime.processes
        written = target is not None and all(target.has(1 + layer) for layer in range(source.shape.num_hidden_layers))
        if not processes.tell(written):
            QuantizingWalk(
                writer,
                processes.share(context.calibration_batches()),
                error_feedback=self.error_feedback,
                runtime=context.runtime,
            ).run()

    def _round_layers(self, context: StageContext, writer: LayerWriter) -> None:
        source, layers = context.source, context.source.shape.num_hidden_layers
        with context.runtime.progress.task("quantize", total=layers, unit="layers") as advance:
            for layer in range(layers):
                if not context.target.has(1 + layer):
                    weights = {k: w.to(context.runtime.device).float() for k, w in source.read_layer(layer).items()}
                    schemes = writer.quantization.in_layer(source.family.layer_prefix(layer))
                    writer.write(layer, round_layer(weights, schemes, writer.scale_dtype))
                advance(1)

    def _check(self, context: StageContext) -> None:
        """Fail if the written checkpoint does not predict what the one before it does."""
        rows = context.held_out_batches()
        quantized = Checkpoint(context.target.folder)
        found = agreement(context.source, quantized, rows, context.runtime)
        context.decisions["agreement"] = {
            "kl_divergence": float(f"{found.divergence:.4g}"),
            "logit_error": float(f"{found.logit_error:.4g}"),
            "same_next_token": float(f"{found.top1:.4g}"),
            "held_out_tokens": found.tokens,
        }
        self.accept(context.decisions, context.source.folder)

    def accept(self, decisions: dict[str, Any], source: Path) -> None:
        """See whether the predictions are near enough to those before."""
        found = decisions["agreement"]
        divergence, error = found["kl_divergence"], found["logit_error"]
        # Where the predictions are nearly flat, the divergence is small whatever happens to them.
        if not (divergence <= self.max_divergence and error < 1):
            raise UserError(
                f"stage {self.label}: the quantized checkpoint does not predict what {source} does: mean KL divergence "
                f"{divergence:.3g} nats over {found['held_out_tokens']} held-out tokens (at most "
                f"{self.max_divergence:g} is allowed), {100 * error:.0f} % squared error of the logits, the same next "
                f"token for {100 * found['same_next_token']:.0f} %. Use more bits, a smaller group_size or more "
                "calibration.samples; a higher max_divergence lets it pass if that is what you want."
            )
