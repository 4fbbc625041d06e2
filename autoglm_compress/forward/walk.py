"""The walk: token batches go through a model one decoder layer at a time. Only one layer is in memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.hidden_states import HiddenStates, remaining_layers
from autoglm_compress.forward.one_layer_model import Fork, OneLayerModel, compute_dtype
from autoglm_compress.memory import give_back_freed_memory
from autoglm_compress.runtime import Runtime


class LayerVisitor(Protocol):
    """The work at each layer besides running it."""

    def enter(self, layer: int, module: nn.Module) -> None:
        """Called after the layer's weights are set and before any tokens. Register hooks here."""

    def leave(self, layer: int, module: nn.Module) -> None:
        """Called after all tokens went through the layer and before the layer counts as done.

        Results that must survive a kill must be on disk when this returns.
        """


@torch.no_grad()
def walk(
    checkpoint: Checkpoint,
    batches: list[torch.Tensor],
    visitor: LayerVisitor | None,
    *,
    runtime: Runtime,
    title: str,
    folder: Path | None = None,
    forks: Sequence[Fork | None] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[torch.Tensor]:
    """Send token batches [batch, length] through all layers of a checkpoint.

    Memory is one layer and the hidden states, which live in mapped files if `folder` is given; a killed walk then
    continues at the layer it had reached, and the visitor is not called again for earlier layers. `forks` says of
    batches of one sequence whether they fork; a sliding window does not reach into those. `dtype` is the dtype of the
    computation, by default `compute_dtype`. With several processes, the batches are this process's share; no layer
    begins before all are done with the one before it.

    Returns:
        An iterator over the batches' last hidden states [batch, length, hidden_size], before the final norm.
    """
    dtype = dtype or compute_dtype(checkpoint, runtime.device)
    states = HiddenStates(batches, checkpoint.shape.hidden_size, dtype, folder, runtime.processes)
    forks = forks or [None] * len(batches)
    layers = checkpoint.shape.num_hidden_layers
    tokens = sum(batch.numel() for batch in batches)
    model = OneLayerModel(checkpoint, runtime.device, dtype)
    total, reached = layers * tokens, states.layers_done * tokens
    with runtime.progress.task(title, total=total, unit="layer-tokens", reached=reached) as advance:
        for layer in remaining_layers([states], layers, lambda: states.embed(batches, checkpoint)):
            module, run = model.load(layer)
            if visitor is not None:
                visitor.enter(layer, module)
            for batch, (before, after), fork in zip(batches, states.pairs(), forks, strict=True):
                after.copy_(run(before, batch, fork))
                advance(before.shape[0] * before.shape[1])
            if visitor is not None:
                visitor.leave(layer, module)
    model.release()
    give_back_freed_memory()
    return iter(states.before)
