"""The statistics that decide which directions or channels of the residual stream to keep, in the present basis."""

from collections.abc import Iterator

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.importance import random_scores
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.cutting.rotation import Rotation
from autoglm_compress.cutting.tying import OUTPUT_WEIGHT, pair_moments, tie_least_squares
from autoglm_compress.forward.statistics import Statistics
from autoglm_compress.slices import row_slices


class ResidualStream:
    """The normalised states of a checkpoint and the linears that read them.

    Args:
        source: the checkpoint that is to be narrowed.
        lineage: which parts of the run's source it still has.
        statistics: those of the run's source.
    """

    def __init__(self, source: Checkpoint, lineage: Lineage, statistics: Statistics) -> None:
        self._source = source
        self._lineage = lineage
        self._statistics = statistics

    def grams(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The Gram matrix of the normalised states of each norm that linears read, by the norm's tensor name.

        [hidden_size, hidden_size], read one by one.
        """
        family, lineage = self._source.family, self._lineage
        for layer, origin in enumerate(lineage.layers):
            gram = lineage.project_gram(self._statistics.layer(origin)["residual_gram"])
            for norm in family.norm_readers:
                yield f"{family.layer_prefix(layer)}{norm}.weight", gram
        yield family.final_norm, self._final_gram()

    def sum_of_grams(self) -> torch.Tensor:
        """The sum of all `grams`."""
        return sum((gram for _, gram in self.grams()), torch.zeros(()))

    def reader_metric(self) -> torch.Tensor:
        """The sum over all linears W that read the normalised states x of W^T W / mean |W x|^2: all count the same.

        [hidden_size, hidden_size], gains included.
        """
        source, family = self._source, self._source.family
        readers = {
            f"{family.layer_prefix(layer)}{norm}.weight": [
                f"{family.layer_prefix(layer)}{reader}.weight" for reader in names
            ]
            for layer in range(source.shape.num_hidden_layers)
            for norm, names in family.norm_readers.items()
        }
        readers[family.final_norm] = [family.embedding if source.shape.tie_word_embeddings else family.head]
        total = torch.zeros(source.shape.hidden_size, source.shape.hidden_size)
        for norm, gram in self.grams():
            gain = source.read(norm).float()
            for name in readers[norm]:
                weight = source.read(name)
                # A softmax ignores a constant added to all logits.
                mean = _mean_row(weight) if norm == family.final_norm else 0.0
                square = sum(
                    ((part := (weight[rows].float() - mean) * gain).T @ part for rows in row_slices(len(weight))),
                    torch.zeros(()),
                )
                total += square / (square * gram).sum().clamp_min(1e-30)
        return total

    def norm_moments(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Each norm's tensor name, and the mean absolute and mean square [hidden_size] of the channels it gives."""
        statistics, lineage, family = self._statistics, self._lineage, self._source.family
        if lineage.basis is not None:
            # In a turned basis only second moments are known; models that can be turned have no norms but those.
            squares = {name: gram.diagonal() for name, gram in self.grams()}
            return [(name, square.sqrt(), square) for name, square in squares.items()]
        channels = list(lineage.channels)
        norms = []
        for layer, origin in enumerate(lineage.layers):
            moments, prefix = statistics.layer(origin), family.layer_prefix(layer)
            norms += [
                (f"{prefix}{norm}.weight", moments[f"{norm}.mean_abs"], moments[f"{norm}.mean_square"])
                for norm in family.hidden_norms
            ]
        final = statistics.final()
        norms.append((family.final_norm, final["mean_abs"], final["mean_square"]))
        return [(name, absolute[channels], square[channels]) for name, absolute, square in norms]

    def channel_scores(self, method: str, seed: int) -> torch.Tensor:
        """Scores [hidden_size] of the channels present, by the method `activation`, `magnitude` or `random`."""
        source = self._source
        if method == "random":
            return random_scores(source.shape.hidden_size, seed, 0)
        if method == "magnitude":
            return source.read(source.family.embedding).float().norm(dim=0)
        behind_writers = tuple(f"{norm}.weight" for norm in source.family.writer_norms.values())
        scores = (
            absolute * source.read(name).float().abs()
            for name, absolute, _ in self.norm_moments()
            if not (behind_writers and name.endswith(behind_writers))
        )
        return sum(scores, torch.zeros(()))

    def tied_again(self, rotation: Rotation) -> dict[str, torch.Tensor]:
        """The shared matrix and the final norm's gain, by name, for tied embeddings that the rotation would
        separate.
        """
        family = self._source.family
        shared = self._source.read(family.embedding)
        embedding, head = (rotation.change(name, shared) for name in (family.embedding, family.head))
        gram = rotation.basis.T @ self._final_gram() @ rotation.basis
        gain = torch.full((len(gram),), rotation.gains[family.final_norm])
        moments = pair_moments(embedding, head)
        tied = tie_least_squares(moments, gain, gram / gram.diagonal().mean(), OUTPUT_WEIGHT)
        return {family.embedding: tied.matrix(embedding, head, moments), family.final_norm: tied.gain}

    def _final_gram(self) -> torch.Tensor:
        return self._lineage.project_gram(self._statistics.final()["residual_gram"])


def energy(basis: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The trace of a Gram matrix [size, size] within the span of orthonormal columns [size, kept]."""
    return ((basis.T @ gram) * basis.T).sum()


def _mean_row(weight: torch.Tensor) -> torch.Tensor:
    return sum((weight[rows].float().sum(0) for rows in row_slices(len(weight))), torch.zeros(())) / len(weight)
