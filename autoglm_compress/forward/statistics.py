"""Statistics of a model's activations for all structural stages, measured in one walk.

Per layer, in `layer-NNNNN.safetensors` (fp32 unless it says otherwise):

- `block_influence` []: 1 - mean cosine similarity of the layer's input and output (ShortGPT, Men et al. 2024);
- `head_norm` [num_attention_heads]: L2 norm of each query head's output, summed over tokens (Minitron, Muralidharan
  et al. 2024);
- `head_gram` [num_attention_heads, head_dim, head_dim]: mean over tokens of z z^T, z being a query head's output;
- `neuron_norm` [intermediate_size]: L2 norm over tokens of each FFN neuron's activation, the input of down_proj;
- `NORM.mean_abs`, `NORM.mean_square` [hidden_size]: moments of the normalised input x / rms(x) of each norm on the
  residual stream, before its gain;
- `residual_gram` [hidden_size, hidden_size]: mean over tokens of x x^T / rms(x)^2, averaged over the norms that linears
  read;
- `boundary` [tokens, hidden_size]: the states that go into the layer, for a fixed sample of at most SAMPLE_TOKENS
  tokens, in bf16: 16 MiB at 4,096 wide. Rounding moves the cosine of two states by some 1e-6. Several processes put
  the tokens of one after those of the other.

`final.safetensors` has the moments and the Gram matrix of the norm before the head, and the states that go into it.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import remove_half_written, save_atomically
from autoglm_compress.errors import UserError
from autoglm_compress.forward.walk import walk
from autoglm_compress.processes import Processes
from autoglm_compress.runtime import Runtime

REVISION = 3
"""Raise it when the same walk would measure something else."""
SAMPLE_TOKENS = 2048
"""Tokens, at most, whose states at every layer are kept."""


class Statistics:
    """The measured activations of one model, read back layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def layer(self, layer: int) -> "StoredTensors":
        """The statistics of one layer of the model that was measured."""
        return StoredTensors(_layer_file(self.folder, layer))

    def final(self) -> "StoredTensors":
        """The moments at the final norm."""
        return StoredTensors(self.folder / "final.safetensors")


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file. Each is read at first use."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def measure(
    checkpoint: Checkpoint,
    batches: list[torch.Tensor],
    folder: Path,
    runtime: Runtime,
) -> Statistics:
    """Walk token batches [batch, length] through a checkpoint and write its statistics into a folder.

    A complete folder is used as it is; a killed walk continues. All processes pass the same batches. Each walks its
    share of the rows, and the first writes the sums of all.
    """
    work, processes = folder / "walk", runtime.processes
    if processes.is_first:
        remove_half_written(folder)
    if not processes.tell((folder / "final.safetensors").exists()):
        sample = processes.share(_sample(batches))
        visitor = _Measure(checkpoint, folder, sample, processes)
        hidden = walk(
            checkpoint,
            processes.share(batches),
            visitor,
            title="measure",
            folder=work,
            runtime=runtime,
        )
        moments = _Moments(with_gram=True)
        boundary = []
        for states, chosen in zip(hidden, sample, strict=True):
            moments.add(states.to(runtime.device), checkpoint.norm_eps)
            boundary.append(_at(states, chosen))
        moments.add_up(processes)
        final = {"residual_gram": moments.mean_gram(), "boundary": processes.put_together(torch.cat(boundary))}
        if processes.is_first:
            save_atomically(folder / "final.safetensors", moments.result() | final)
    if processes.is_first:
        shutil.rmtree(work, ignore_errors=True)
    return Statistics(folder)


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


def _sample(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Which tokens of each batch [batch, length] belong to the sample, bool of the same shape.

    The sample is spread evenly over all tokens. It takes the middle of each interval, because the first token would
    often be the first of a row, whose states are unusual.
    """
    sizes = [batch.numel() for batch in batches]
    tokens = sum(sizes)
    count = min(tokens, SAMPLE_TOKENS)
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[(2 * torch.arange(count) + 1) * tokens // (2 * count)] = True
    return [part.view_as(batch) for part, batch in zip(chosen.split(sizes), batches, strict=True)]


def _at(states: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The states [batch, length, hidden_size] of chosen tokens, bf16 [tokens, hidden_size]."""
    return states[chosen.to(states.device)].to("cpu", torch.bfloat16)


class _Moments:
    """Running moments of x / rms(x): first absolute and second per channel, and the Gram matrix if asked for."""

    def __init__(self, with_gram: bool) -> None:
        self.with_gram = with_gram
        self.tokens = torch.zeros((), dtype=torch.long)
        self.abs = torch.zeros(())
        self.square = torch.zeros(())
        self.gram = torch.zeros(())

    def add(self, states: torch.Tensor, eps: float) -> None:
        x = states.flatten(0, -2).float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        self.tokens += x.shape[0]
        self.abs = self.abs.to(x.device) + x.abs().sum(0, dtype=torch.float64)
        self.square = self.square.to(x.device) + x.square().sum(0, dtype=torch.float64)
        if self.with_gram:
            self.gram = self.gram.to(x.device) + x.T @ x

    def add_up(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        for total in (self.tokens, self.abs, self.square, *([self.gram] if self.with_gram else [])):
            processes.add_up(total)

    def result(self) -> dict[str, torch.Tensor]:
        return {
            "mean_abs": (self.abs / self.tokens).float().cpu(),
            "mean_square": (self.square / self.tokens).float().cpu(),
        }

    def mean_gram(self) -> torch.Tensor:
        return (self.gram / self.tokens).cpu()


class _Measure:
    """The walk's visitor: hooks on one layer at a time add up sums over tokens."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, sample: list[torch.Tensor], processes: Processes) -> None:
        self.sample = sample
        self.processes = processes
        self.family = checkpoint.family
        self.head_dim = checkpoint.shape.head_dim
        self.eps = checkpoint.norm_eps
        self.folder = folder

    def enter(self, layer: int, module: nn.Module) -> None:
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.moments = {norm: _Moments(norm in self.family.norm_readers) for norm in self.family.hidden_norms}
        self.boundary: list[torch.Tensor] = []
        self.tokens = torch.zeros((), dtype=torch.long)
        self.hooks = [
            module.register_forward_pre_hook(self._boundary),
            module.register_forward_hook(self._cosine),
            module.get_submodule(self.family.attention_output).register_forward_pre_hook(self._heads),
            module.get_submodule(self.family.mlp_output).register_forward_pre_hook(self._neurons),
        ]
        for norm, moments in self.moments.items():
            hook = lambda _, inputs, moments=moments: moments.add(inputs[0], self.eps)  # noqa: E731
            self.hooks.append(module.get_submodule(norm).register_forward_pre_hook(hook))

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name].to(value.device) + value.double()

    def _boundary(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.boundary.append(_at(inputs[0], self.sample[len(self.boundary)]))

    def _cosine(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        cosine = nn.functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
        self.tokens += cosine.numel()
        self._add("cosine", cosine.sum(dtype=torch.float64))

    def _heads(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        heads = inputs[0].unflatten(-1, (-1, self.head_dim)).float()
        self._add("head_norm", heads.norm(dim=-1).sum((0, 1), dtype=torch.float64))
        self._add("head_gram", torch.einsum("btha,bthc->hac", heads, heads))

    def _neurons(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._add("neuron_square", inputs[0].float().square().sum((0, 1), dtype=torch.float64))

    def leave(self, layer: int, module: nn.Module) -> None:
        for hook in self.hooks:
            hook.remove()
        for total in (self.tokens, *self.sums.values()):
            self.processes.add_up(total)
        for moments in self.moments.values():
            moments.add_up(self.processes)
        boundary = self.processes.put_together(torch.cat(self.boundary))
        if not self.processes.is_first:
            return
        result = {
            "block_influence": 1 - self.sums["cosine"] / self.tokens,
            "head_norm": self.sums["head_norm"],
            "head_gram": self.sums["head_gram"] / self.tokens,
            "neuron_norm": self.sums["neuron_square"].sqrt(),
            "residual_gram": torch.stack([m.mean_gram() for m in self.moments.values() if m.with_gram]).mean(0),
        }
        if not all(torch.isfinite(value).all() for value in result.values()):
            raise UserError(
                f"layer {layer}: activations are NaN or infinite for some calibration tokens: the model overflows in "
                "the dtype it is computed in, or its weights are damaged."
            )
        result |= {f"{norm}.{key}": m for norm, sums in self.moments.items() for key, m in sums.result().items()}
        stored = {key: value.float().cpu() for key, value in result.items()}
        save_atomically(_layer_file(self.folder, layer), stored | {"boundary": boundary})
