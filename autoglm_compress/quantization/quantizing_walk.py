"""Quantizing all layers, linear by linear as the tokens reach them. A layer is on disk before the next begins."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.forward.activations import linear_of
from autoglm_compress.forward.hidden_states import HiddenStates, remaining_layers
from autoglm_compress.forward.one_layer_model import OneLayerModel, fast_dtype
from autoglm_compress.memory import bound_freed_memory
from autoglm_compress.progress import Advance
from autoglm_compress.quantization.input_statistics import InputStatistics
from autoglm_compress.quantization.layer_quantizer import LayerQuantizer
from autoglm_compress.quantization.smoothing import Pair, smoothing_pairs
from autoglm_compress.quantization.stepwise_layer import KeptActivations, StepwiseLayer
from autoglm_compress.quantization.writing import LayerWriter, stored_dtypes
from autoglm_compress.runtime import Runtime


def walk_and_quantize(
    source: Checkpoint,
    batches: Callable[[], list[torch.Tensor]],
    *,
    writer: LayerWriter | None,
    folder: Path,
    error_feedback: bool,
    runtime: Runtime,
) -> None:
    """Quantize layer after layer, each process with its rows, unless the first finds that all are written.

    Args:
        source: the checkpoint that is quantized.
        batches: gives the token ids [batch, length] of all processes.
        writer: of the layers, in the first process, which quantizes them; None in the others.
        folder: where hidden states are kept; it outlasts a kill.
        error_feedback: whether what rounding a feature does is made up for by those after it.
        runtime: where layers run, and the processes that walk.

    Raises:
        UserError: there were NaN or infinite inputs.
    """
    if not runtime.processes.tell(writer is not None and writer.all_written):
        shared = runtime.processes.share(batches())
        QuantizingWalk(
            source, shared, writer=writer, folder=folder, error_feedback=error_feedback, runtime=runtime
        ).run()


class QuantizingWalk:
    """Takes calibration tokens through all layers, and quantizes each linear before its outputs are computed.

    Every linear is therefore fitted to the outputs of the quantized linears before it, including those of its own
    layer. With several processes, the first quantizes with the input statistics of all, and the others take its
    weights.

    Args:
        source: the checkpoint that is quantized.
        batches: this process's token ids [batch, length].
        writer: of the layers, in the first process, which quantizes them; None in the others.
        folder: where hidden states are kept; it outlasts a kill.
        error_feedback: whether what rounding a feature does is made up for by those after it.
        runtime: where layers run, and which processes walk.
    """

    def __init__(
        self,
        source: Checkpoint,
        batches: list[torch.Tensor],
        *,
        writer: LayerWriter | None,
        folder: Path,
        error_feedback: bool,
        runtime: Runtime,
    ) -> None:
        self.writer = writer
        self.source, self.folder = source, folder
        self.batches = batches
        self.error_feedback = error_feedback
        self.device, self.progress, self.processes = runtime.device, runtime.progress, runtime.processes
        dtype = fast_dtype(self.source, runtime.device)
        self.states = HiddenStates(batches, self.source.shape.hidden_size, dtype, folder, runtime.processes)
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
        own = self.states.folder if self.device.type == "cpu" else None  # of this process, not of all
        kept = KeptActivations(own) if own else None
        parts = StepwiseLayer(module, run, self.batches, self.states, self.source.family, kept)
        quantizer = self._quantizer(layer, module)
        pairs = smoothing_pairs(self.source.shape, layer)

        def measured(tokens: int) -> None:
            advance(tokens / len(pairs))

        for pair in pairs:
            inputs = self._measure(layer, module, pair, parts, measured)
            readers = {reader: linear_of(module, reader) for reader in pair.readers}
            if quantizer:
                for linear in readers.values():
                    linear.register_parameter("weight", None)  # so that the unquantized weight does not stay in memory
                for reader, weight in quantizer.quantize(pair, inputs).items():
                    readers[reader].weight = nn.Parameter(weight, requires_grad=False)
            del inputs
            bound_freed_memory()
            for reader, linear in readers.items():
                self.processes.copy_first(linear.weight)
                parts.settle(reader)
        if self.writer and quantizer:
            self.writer.write(layer, quantizer.result())
        if layer + 1 < self.source.shape.num_hidden_layers:
            parts.compute_outputs()

    def _quantizer(self, layer: int, module: nn.Module) -> LayerQuantizer | None:
        """The quantizer of a layer, in the process that quantizes."""
        if self.writer is None:
            return None
        return LayerQuantizer(
            {name: parameter.detach() for name, parameter in module.named_parameters()},
            self.writer.quantization.in_layer(self.source.family.layer_prefix(layer)),
            stored_dtypes(self.source, layer),
            self.writer.scale_dtype,
            error_feedback=self.error_feedback,
        )

    def _measure(
        self, layer: int, module: nn.Module, pair: Pair, parts: StepwiseLayer, measured: Callable[[int], None]
    ) -> InputStatistics:
        """The input statistics of a pair's readers, over all processes. `measured` is called with the number of
        tokens.
        """
        reader = linear_of(module, pair.readers[0])
        found = InputStatistics(reader.in_features, reader.weight.device)
        for inputs in parts.inputs_of(pair.readers[0]):
            found.add(inputs)
            measured(inputs.shape[0] * inputs.shape[1])
        found.add_up(self.processes)
        if not found.finite:
            raise UserError(
                f"{self.source.folder}: layer {layer}: the inputs of {', '.join(pair.readers)} are NaN or infinite "
                f"for some calibration tokens: the model overflows in {self.source.dtype} or its weights are damaged."
            )
        return found
