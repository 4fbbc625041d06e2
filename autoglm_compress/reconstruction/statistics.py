"""What the structural stages need to know about a model's activations, measured in one walk over it.

Per layer, in `layer-NNNNN.safetensors` (fp32 unless it says otherwise):

- `block_influence` []: 1 - mean cosine similarity of the layer's input and output (ShortGPT, Men et al. 2024);
- `head_norm` [num_attention_heads]: L2 norm of each query head's output, summed over tokens (Minitron, Muralidharan
  et al. 2024);
- `neuron_norm` [intermediate_size]: L2 norm over tokens of each FFN neuron's activation, the input of down_proj;
- `NORM.mean_abs`, `NORM.mean_square` [hidden_size]: moments of the normalised input x / rms(x) of each norm on the
  residual stream, before its gain.

`final.safetensors` has the same two moments for the norm before the head.
"""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.progress import Progress
from autoglm_compress.reconstruction.walk import walk

REVISION = 1
"""Raised when the same walk would measure something else."""


class Statistics:
    """The measured activations of one model, read back layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """The statistics of one layer of the model that was measured."""
        return load_file(_layer_file(self.folder, layer))

    def final(self) -> dict[str, torch.Tensor]:
        """The moments at the final norm."""
        return load_file(self.folder / "final.safetensors")


def measure(
    checkpoint: Checkpoint, batches: list[torch.Tensor], folder: Path, device: torch.device, progress: Progress
) -> Statistics:
    """Walk token batches [batch, length] through a checkpoint and write its statistics into a folder.

    A folder that is complete is used as it is; one whose walk was killed is gone on with.
    """
    if not (folder / "final.safetensors").exists():
        visitor = _Measure(checkpoint, folder)
        work = folder / "walk"
        hidden = walk(checkpoint, batches, visitor, device=device, progress=progress, title="measure", folder=work)
        moments = _Moments()
        for states in hidden:
            moments.add(states, checkpoint.model_config.rms_norm_eps)
        save_atomically(folder / "final.safetensors", moments.result())
        for file in work.iterdir():
            file.unlink()
        work.rmdir()
    return Statistics(folder)


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


class _Moments:
    """Running first absolute and second moments of x / rms(x), per channel."""

    def __init__(self) -> None:
        self.tokens = 0
        self.abs = torch.zeros(())
        self.square = torch.zeros(())

    def add(self, states: torch.Tensor, eps: float) -> None:
        x = states.flatten(0, -2).float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        self.tokens += x.shape[0]
        self.abs = self.abs.to(x.device) + x.abs().sum(0, dtype=torch.float64)
        self.square = self.square.to(x.device) + x.square().sum(0, dtype=torch.float64)

    def result(self) -> dict[str, torch.Tensor]:
        return {
            "mean_abs": (self.abs / self.tokens).float().cpu(),
            "mean_square": (self.square / self.tokens).float().cpu(),
        }


class _Measure:
    """The walk's visitor: hooks on one layer at a time add up sums over tokens."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.family = checkpoint.family
        self.head_dim = checkpoint.shape.head_dim
        self.eps = checkpoint.model_config.rms_norm_eps
        self.folder = folder

    def enter(self, layer: int, module: nn.Module) -> None:
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.moments = {norm: _Moments() for norm in self.family.hidden_norms}
        self.tokens = 0
        self.hooks = [
            module.register_forward_hook(self._cosine),
            module.get_submodule(self.family.attention_output).register_forward_pre_hook(self._heads),
            module.get_submodule(self.family.mlp_output).register_forward_pre_hook(self._neurons),
        ]
        for norm, moments in self.moments.items():
            hook = lambda _, inputs, moments=moments: moments.add(inputs[0], self.eps)  # noqa: E731
            self.hooks.append(module.get_submodule(norm).register_forward_pre_hook(hook))

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name].to(value.device) + value.double()

    def _cosine(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        cosine = nn.functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
        self.tokens += cosine.numel()
        self._add("cosine", cosine.sum(dtype=torch.float64))

    def _heads(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        heads = inputs[0].unflatten(-1, (-1, self.head_dim)).float()
        self._add("head_norm", heads.norm(dim=-1).sum((0, 1), dtype=torch.float64))

    def _neurons(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._add("neuron_square", inputs[0].float().square().sum((0, 1), dtype=torch.float64))

    def leave(self, layer: int, module: nn.Module) -> None:
        for hook in self.hooks:
            hook.remove()
        result = {
            "block_influence": 1 - self.sums["cosine"] / self.tokens,
            "head_norm": self.sums["head_norm"],
            "neuron_norm": self.sums["neuron_square"].sqrt(),
        }
        result |= {f"{norm}.{key}": m for norm, sums in self.moments.items() for key, m in sums.result().items()}
        save_atomically(_layer_file(self.folder, layer), {key: value.float().cpu() for key, value in result.items()})
