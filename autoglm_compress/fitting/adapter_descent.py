"""The parts of towers before a shared projection, trained so that it gives the features that the towers gave before.

Closed form finds the one projection nearest to all. The modules before it can then be moved so that what goes into it
suits it better. The projection stays.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.fitting.affine import with_one
from autoglm_compress.fitting.descent import Descent, descend
from autoglm_compress.forward.projections import ProjectedChats, Towers
from autoglm_compress.progress import Progress

CHATS = 8
"""Chats of a step."""


@dataclass(frozen=True)
class ChatBatch:
    """The numbers of some chats, [chats], and which of them decide."""

    numbers: torch.Tensor
    held_out: torch.Tensor

    def take(self, held_out: bool, device: torch.device) -> tuple[torch.Tensor]:
        """The numbers of the chats to fit to, or of those that decide."""
        return (self.numbers[self.held_out if held_out else ~self.held_out],)


def batches_of(fitted: Sequence[int], deciding: Sequence[int]) -> list[ChatBatch]:
    """Chats in batches, those that decide after those that are fitted to."""
    numbers = torch.tensor([*fitted, *deciding])
    decides = torch.arange(len(numbers)) >= len(fitted)
    return [ChatBatch(*pair) for pair in zip(numbers.split(CHATS), decides.split(CHATS), strict=True)]


class SharedTowers:
    """A checkpoint's towers in fp32 with one projection in all places, against their features before.

    Args:
        checkpoint: has the towers.
        chats: what goes into the projections of the towers as they are.
        projections: those of the towers as they are, [out, in + 1] by the kind of features, with the bias as the last
            column.
        shared: the one that takes their places.
        spreads: the mean squared distance of each kind's features from their mean.
        device: where towers run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chats: ProjectedChats,
        projections: Mapping[str, torch.Tensor],
        shared: torch.Tensor,
        spreads: Mapping[str, float],
        device: torch.device,
    ) -> None:
        self._towers, self._device = Towers(checkpoint, device, torch.float32), device
        self._chats, self._spreads = chats, spreads
        self._projections = {kind: each.to(device, torch.float32) for kind, each in projections.items()}
        for linear in self._towers.linears.values():
            linear.get_parameter("weight").copy_(shared[:, :-1])
            linear.get_parameter("bias").copy_(shared[:, -1])

    def fit(self, batches: Sequence[ChatBatch], passes: int, progress: Progress) -> Descent:
        """Train the parts before the projection, in place, for a number of passes over the batches.

        The loss of a chat is the mean over its kinds of their relative squared errors.
        """

        def loss(numbers: torch.Tensor, backward: bool) -> float:
            total = 0.0
            for number in numbers.tolist():
                errors = self._errors(number)
                error = torch.stack([each.mean() for each in errors.values()]).mean() / len(numbers)
                if backward:
                    error.backward()
                total += error.item()
            return total

        with progress.task("fit what is before the shared adapter", total=passes, unit="passes") as advance:
            return descend(list(self._towers.trained_parts().values()), batches, loss, passes, advance=advance)

    @torch.no_grad()
    def errors(self, numbers: Iterable[int]) -> dict[str, float]:
        """The mean squared error of each kind's features in some chats, relative to its spread."""
        found: dict[str, list[torch.Tensor]] = {}
        for number in numbers:
            for kind, errors in self._errors(number).items():
                found.setdefault(kind, []).append(errors)
        return {kind: float(torch.cat(errors).mean()) for kind, errors in found.items()}

    def _errors(self, number: int) -> dict[str, torch.Tensor]:
        """The squared errors [features] of each kind in a chat, relative to its spread."""
        _, outputs = self._towers.run(number)
        before = self._chats.of(number)
        found = {}
        for kind, parts in outputs.items():
            target = with_one(before[kind].to(self._device), True) @ self._projections[kind].T
            found[kind] = (torch.cat(parts) - target).square().sum(-1) / self._spreads[kind]
        return found

    def trained(self) -> dict[str, torch.Tensor]:
        """The trained tensors, by their names in a checkpoint."""
        return {name: parameter.detach().cpu() for name, parameter in self._towers.trained_parts().items()}
