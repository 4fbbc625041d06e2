"""The layers at both ends of a model, fitted to a matrix that has become embedding and head at once.

Least squares finds the matrix closest to both, which is close to neither. The layers between the ends can stay as they
are if the first layers give the same states as before, and if the last layers and the matrix turn their states into the
same predictions. Those few layers, the matrix and the final norm are therefore trained for that, against the untied
checkpoint. Per token this costs a small part of healing all layers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.divided_rows import DividedRows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.errors import UserError
from autoglm_compress.fitting.descent import Descent, descend
from autoglm_compress.fitting.next_token_loss import UNLABELLED, FromStates, differentiable_loss
from autoglm_compress.forward.costs import FP32, graph_memory, head_elements, layer_memory, training_memory
from autoglm_compress.forward.features import counted, embedded
from autoglm_compress.forward.logits import logits_memory
from autoglm_compress.forward.one_layer_model import OneLayerModel, final_norm
from autoglm_compress.forward.walk import walk
from autoglm_compress.progress import Progress
from autoglm_compress.runtime import Runtime

MOST_LAYERS = 2
"""The number of layers trained at each end, at most half of all."""
STORED = torch.bfloat16


def end_layers(layers: int) -> tuple[range, range]:
    """The numbers of the first and the last layers to train."""
    number = min(MOST_LAYERS, layers // 2)
    return range(number), range(layers - number, layers)


def ends_memory(shape: ModelShape, tokens: int, at_once: int) -> int:
    """Bytes of what is trained and its gradients in fp32, of three states of all tokens in 16 bits, and of a step.

    A step has the untied head and the matrix that training began with as they are stored, the graph of a batch of
    `at_once` tokens, logits, and the gradients of the matrix as an embedding and as a head before they are added up.
    """
    pair, ends = head_elements(shape), sum(map(len, end_layers(shape.num_hidden_layers)))
    trained = 2 * FP32 * pair + 2 * ends * layer_memory(shape)
    states = 3 * 2 * tokens * shape.hidden_size + 6 * FP32 * at_once * shape.hidden_size
    graph = (ends - 1) * graph_memory(shape, at_once) + training_memory(shape, at_once)
    step = 2 * FP32 * pair + graph + logits_memory(at_once, shape.vocab_size)
    return trained + 2 * shape.element_bytes * pair + states + step


def ends_scratch(shape: ModelShape, tokens: int) -> int:
    """Bytes of disk for the walk's two buffers in fp32, and two states of each token in 16 bits."""
    return 3 * FP32 * tokens * shape.hidden_size


@dataclass(frozen=True)
class EndStates:
    """A batch in the untied model. States are [rows, length, hidden_size].

    `tokens` [rows, length], the states after the first layers, before the last ones and after those, and which of the
    rows are held out.
    """

    tokens: torch.Tensor
    after_first: torch.Tensor
    before_last: torch.Tensor
    final: torch.Tensor
    held_out: torch.Tensor

    def take(self, held_out: bool, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Tokens and states of the rows to fit to, or of those that decide, in fp32."""
        rows = self.held_out if held_out else ~self.held_out
        states = (part[rows].to(device).float() for part in (self.after_first, self.before_last, self.final))
        return self.tokens[rows].to(device), *states


class _Recorder:
    """The walk's visitor: saves the outputs of some layers, one file each."""

    def __init__(self, folder: Path, layers: Iterable[int]) -> None:
        self.folder, self.layers = folder, set(layers)

    def file(self, layer: int) -> Path:
        return self.folder / f"after-{layer:05d}.safetensors"

    def enter(self, layer: int, module: nn.Module) -> None:
        self.found: list[torch.Tensor] = []
        if layer in self.layers:
            self.hook = module.register_forward_hook(
                lambda _, inputs, output: self.found.append(output.to("cpu", STORED))
            )

    def leave(self, layer: int, module: nn.Module) -> None:
        if layer in self.layers:
            self.hook.remove()
            save_atomically(self.file(layer), {str(number): part for number, part in enumerate(self.found)})


def record(checkpoint: Checkpoint, rows: DividedRows, folder: Path, runtime: Runtime) -> list[EndStates]:
    """Send rows through an untied checkpoint and keep in `folder` the states that its ends are fitted to or judged by.

    A killed walk continues at the layer it had reached.

    Raises:
        UserError: the states are not finite.
    """
    first, last = end_layers(checkpoint.shape.num_hidden_layers)
    recorder = _Recorder(folder, (first[-1], last[0] - 1))
    hidden = walk(
        checkpoint, rows.batches, recorder, runtime=runtime.alone(), title="untied model", folder=folder / "walk"
    )
    after_first, before_last = (load_file(recorder.file(layer)) for layer in (first[-1], last[0] - 1))
    found = [
        EndStates(tokens, after_first[str(number)], before_last[str(number)], final.to("cpu", STORED), decides)
        for number, (tokens, final, decides) in enumerate(zip(rows.batches, hidden, rows.deciding, strict=True))
    ]
    if not all(batch.final.isfinite().all() for batch in found):
        raise UserError(
            f"{checkpoint.folder}: activations are NaN or infinite for some calibration tokens: the model overflows in "
            f"{checkpoint.dtype} or its weights are damaged."
        )
    return found


class TiedEnds:
    """The trained parts: the shared matrix [vocab_size, hidden_size], the final norm's gain and the layers at the ends.

    All in fp32, beginning with the untied checkpoint's layers.
    """

    def __init__(self, untied: Checkpoint, matrix: torch.Tensor, gain: torch.Tensor, device: torch.device) -> None:
        self.untied, self.device = untied, device
        self.matrix = matrix.to(device, torch.float32, copy=True)
        self.norm = final_norm(untied, device).float()
        self.norm.get_parameter("weight").copy_(gain)
        # One model each, because a model exchanges its layer's weights.
        self.layers = {
            layer: OneLayerModel(untied, device, torch.float32).load(layer)
            for end in end_layers(untied.shape.num_hidden_layers)
            for layer in end
        }

    def fit(self, batches: list[EndStates], passes: int, progress: Progress) -> Descent:
        """Train for a number of passes over the batches.

        The loss is the relative squared error of the states after the first layers, and the divergence KL(untied ||
        tied) in nats of what the last ones predict from the untied model's states before them, each averaged over
        tokens.
        """
        norm, head = final_norm(self.untied, self.device).float(), self.untied.head_weight().to(self.device)
        first, last = end_layers(self.untied.shape.num_hidden_layers)
        parameters = [self.matrix, *self.norm.parameters()]
        parameters += [weight for module, _ in self.layers.values() for weight in module.parameters()]

        def loss(
            tokens: torch.Tensor,
            after_first: torch.Tensor,
            before_last: torch.Tensor,
            final: torch.Tensor,
            backward: bool,
        ) -> float:
            states = self._through(first, embedded(self.untied, tokens, self.matrix), tokens)
            size = after_first.square().mean(-1).clamp_min(1e-12)
            error = ((states - after_first).square().mean(-1) / size).mean()
            counts = counted(tokens, len(head))
            predicted = self.norm(self._through(last, before_last, tokens))[counts]
            with torch.no_grad():
                expected = FromStates(norm(final)[counts], head)
            unlabelled = torch.full((len(predicted),), UNLABELLED, device=tokens.device)
            total = error + differentiable_loss(predicted, self.matrix, expected, unlabelled, 0.0)
            if backward:
                total.backward()
            return total.item()

        with progress.task("fit the tied ends", total=passes, unit="passes") as advance:
            return descend(parameters, batches, loss, passes, advance=advance)

    def _through(self, layers: range, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            states = self.layers[layer][1](states, tokens)
        return states

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained tensors, by their names in a checkpoint."""
        family = self.untied.family
        yield family.embedding, self.matrix
        yield family.final_norm, self.norm.get_parameter("weight").detach()
        for layer, (module, _) in self.layers.items():
            for name, weight in module.named_parameters():
                yield family.layer_prefix(layer) + name, weight.detach()
