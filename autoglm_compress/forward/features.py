"""What a model's own towers make of images and sounds, in the place of embeddings.

`transformers` itself is asked: the model is built with its towers and without text layers, takes what its processor
makes of a chat, and is stopped where its decoder would begin. Its inputs are then the embeddings with the features in
them, and the positions. Embeddings are NaN there, so what is not NaN is a feature.

A token id past the vocabulary says which feature stands at its place (see `calibration/media_chats.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from autoglm_compress.calibration.media_chats import MediaChats
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.errors import UserError
from autoglm_compress.hashing import key_of
from autoglm_compress.runtime import Runtime

VOCABULARY = 16
"""Rows of the embedding that the towers' model has in place of its own."""


Watcher = Callable[[torch.Tensor, torch.Tensor], None]
"""Is given the inputs [tokens, in] and the outputs [tokens, out] of a module, in fp32, each time that it runs."""


class _Reached(Exception):  # noqa: N818 - not an error
    """Raised where the decoder would begin."""


@dataclass(frozen=True)
class Seen:
    """What a model's decoder is given for a chat.

    `vectors` [features, hidden_size] in fp32; `positions` [axes, features], each counted from where its image or sound
    begins, None where all tokens are simply counted; `deeper` [layers, features, hidden_size], what is added after the
    first layers.
    """

    vectors: torch.Tensor
    positions: torch.Tensor | None
    deeper: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All, by name, for a file."""
        found = {"vectors": self.vectors, "deeper": self.deeper}
        return found if self.positions is None else found | {"positions": self.positions}


class Features:
    """The features of the chats that a run reads, as one checkpoint's towers make them.

    They are made when they are asked for first, and kept in files.

    Args:
        checkpoint: has the towers.
        chats: what was read.
        root: a folder for files of this process alone.
        runtime: where towers run.
        dtype: what they compute in.
        folders: number the folders of checkpoints within `root`.
        changed: tensors of the towers that are not the checkpoint's, by name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chats: MediaChats,
        root: Path,
        runtime: Runtime,
        dtype: torch.dtype,
        folders: Iterator[int] | None = None,
        changed: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._checkpoint, self._chats, self._changed = checkpoint, chats, changed or {}
        self._root, self._folders = root, folders or count()
        self._folder = root / f"checkpoint-{next(self._folders)}"
        self._runtime, self._device, self._dtype = runtime, runtime.device, dtype
        self._contents: dict[int, str] = {}
        self._positions: dict[int, torch.Tensor | None] = {}
        self._deeper = 0

    def of(self, checkpoint: Checkpoint, changed: Mapping[str, torch.Tensor] | None = None) -> "Features":
        """The features that another checkpoint's towers make of the same chats, some of their tensors changed."""
        return Features(checkpoint, self._chats, self._root, self._runtime, self._dtype, self._folders, changed)

    def inputs_of(self, number: int) -> dict[str, torch.Tensor]:
        """What the model takes for a chat, by the chat's number."""
        return self._chats.inputs_of(self._chats.chat(number))

    def watch(self, chats: Iterable[int], watchers: Mapping[str, Watcher]) -> Iterator[int]:
        """Let the towers see chats once more, and yield the number of each when it was seen.

        The towers are in memory until the last one.

        Args:
            chats: their numbers.
            watchers: who is told what goes through a module of the towers, by its name in files.
        """
        numbers = sorted(chats)
        model = self._model()
        for name, told in watchers.items():
            tower_module(model, name).register_forward_hook(_telling(told))
        with self._runtime.progress.task("see and hear", total=len(numbers), unit="chats") as advance:
            for number in numbers:
                self._seen(model, number)
                yield number
                advance(1)

    def content(self, number: int) -> str:
        """A hash of a chat and its files, the same in every process; its number depends on what was read before."""
        if number not in self._contents:
            self._contents[number] = key_of(self._chats.chat(number).content)
        return self._contents[number]

    def embedded(self, rows: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Rows [rows, length] of ids as an embedding [vocab_size, hidden_size] and the towers give them."""
        stands = rows >= self._chats.vocab_size
        found = nn.functional.embedding(rows.masked_fill(stands, 0), embedding)
        if stands.any():
            found = found.to(torch.promote_types(found.dtype, self._dtype))  # or features would be rounded
            found[stands] = self._values(rows[stands].cpu(), "vectors").to(found)
        return found

    def arguments(self, rows: torch.Tensor, layer: int | None = None) -> dict[str, Any]:
        """What a `transformers` decoder takes beside the embeddings of rows [rows, length]: positions, deeper features.

        Args:
            rows: ids.
            layer: the one layer that the decoder has; None for all.
        """
        rows = rows.cpu()
        stands = rows >= self._chats.vocab_size
        if not stands.any():
            return {}
        self._look()
        positions = self._positions_of(rows)
        found: dict[str, Any] = {}
        if positions is not None:
            found["position_ids"] = positions.to(self._device)
        layers = range(self._deeper) if layer is None else range(layer, min(layer + 1, self._deeper))
        if layers:
            deeper = self._values(rows[stands], "deeper", dim=1)
            found |= {
                "visual_pos_masks": stands.to(self._device),
                "deepstack_visual_embeds": [deeper[each].to(self._device, self._dtype) for each in layers],
            }
        return found

    def _positions_of(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The positions [axes, rows, length] of rows, in which one chat follows the other."""
        if any(self._positions[number] is None for number in self.chats_in(rows)):
            return None
        return torch.stack([self._row_positions(row) for row in rows], dim=1)

    def _row_positions(self, row: torch.Tensor) -> torch.Tensor:
        """The positions [axes, length] of one row."""
        parts, following = [], 0
        owners, lengths = torch.unique_consecutive(self._chats.owners(row), return_counts=True)
        for number, part in zip(owners.tolist(), row.split(lengths.tolist()), strict=True):
            if number >= 0:
                known = self._positions[number]
                assert known is not None  # checked by the caller
                places = following + known[:, part - self._chats.features_of(number).start]
            else:
                places = (following + torch.arange(len(part))).expand(3, -1)
            parts.append(places)
            following = int(places.max()) + 1
        return torch.cat(parts, dim=1)

    def _values(self, ids: torch.Tensor, name: str, dim: int = 0) -> torch.Tensor:
        """Some features' vectors, in the order of their ids [n]."""
        self._look()
        parts = []
        for number in self.chats_in(ids):
            own = self._chats.features_of(number)
            with safe_open(self._file(number), framework="pt") as tensors:
                parts.append((own, tensors.get_tensor(name)))
        places = torch.cat([torch.arange(own.start, own.stop) for own, _ in parts])
        return torch.cat([part for _, part in parts], dim=dim).index_select(dim, torch.searchsorted(places, ids))

    def _file(self, number: int) -> Path:
        return self._folder / f"chat-{number:06d}.safetensors"

    def chats_in(self, ids: torch.Tensor) -> list[int]:
        """The numbers of the chats that have features among some ids of any shape, in order."""
        return [number for number in self._chats.owners(ids.cpu()).unique().tolist() if number >= 0]

    def _look(self) -> None:
        """Let the towers see all chats that were read and that they have not seen yet. They are in memory meanwhile."""
        missing = [number for number in range(self._chats.count) if number not in self._positions]
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        model = self._model()
        with self._runtime.progress.task("see and hear", total=len(missing), unit="chats") as advance:
            for number in missing:
                seen = self._seen(model, number)
                save_atomically(self._file(number), seen.tensors())
                self._positions[number], self._deeper = seen.positions, max(self._deeper, len(seen.deeper))
                advance(1)

    def _model(self) -> Any:
        return towers_of(self._checkpoint, self._device, self._dtype, self._changed)

    def _seen(self, model: Any, number: int) -> Seen:
        chat, expected = self._chats.chat(number), len(self._chats.features_of(number))
        seen = see(model, self._chats.inputs_of(chat), self._checkpoint.shape.hidden_size)
        if len(seen.vectors) != expected:
            raise UserError(
                f"{chat.where}: the model's towers give {len(seen.vectors)} features, and {expected} tokens stand "
                "for them. Model, processor and chat template do not belong together."
            )
        return seen


def towers_of(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    changed: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """A checkpoint's model with its towers, without text layers, and with an embedding of a few rows.

    `changed` are tensors in the place of the towers' own, by name.
    """
    config = checkpoint.whole_unquantized_config()
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, VOCABULARY, None
    for name in checkpoint.lists_per_layer:
        setattr(text, name, [])
    weights = dict(checkpoint.kept_weights()) | dict(changed or {})
    return model_with(checkpoint, config, weights, device, dtype)


def model_with(
    checkpoint: Checkpoint, config: Any, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Any:
    """The model of a checkpoint's architecture that a config describes, with weights by their names in files."""
    import transformers

    kind = getattr(transformers, checkpoint.family.architecture)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists all that is left out
    try:
        model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    finally:
        transformers.logging.set_verbosity(before)
    return model.to(device).eval().requires_grad_(False)


def tower_module(model: nn.Module, name: str) -> nn.Module:
    """A module of the towers by its name in files, where names may lack the beginning that `transformers` has."""
    return next(module for full, module in model.named_modules() if f".{full}".endswith(f".{name}"))


def _telling(told: Watcher) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        told(inputs[0].flatten(0, -2).float(), output.flatten(0, -2).float())

    return hook


@torch.no_grad()
def see(model: Any, inputs: dict[str, torch.Tensor], hidden_size: int) -> Seen:
    """What a model's decoder would be given for the inputs of one chat; arguments are as `decoder_arguments` takes."""
    given = decoder_arguments(model, inputs, hidden_size)
    embeds = given["inputs_embeds"][0]
    stands = ~embeds.isnan().any(-1)
    vectors = embeds[stands].float().cpu()
    deeper = [each.float().cpu() for each in given.get("deepstack_visual_embeds") or ()]
    positions = given.get("position_ids")
    return Seen(
        vectors.contiguous(),
        None if positions is None else _from_starts(positions[-3:, 0].cpu(), stands.cpu()),
        torch.stack(deeper) if deeper else vectors.new_empty(0, *vectors.shape),
    )


def decoder_arguments(model: Any, inputs: dict[str, torch.Tensor], hidden_size: int) -> dict[str, Any]:
    """The arguments of a model's decoder for the inputs of one chat, with NaN for the embeddings of text.

    Args:
        model: as `towers_of` makes it, or a whole one.
        inputs: of the model's processor.
        hidden_size: the width of embeddings.
    """
    given: dict[str, Any] = {}

    def reached(_: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        given.update(arguments)
        raise _Reached

    embedding = model.get_input_embeddings()
    embedding.forward = lambda ids: torch.full((*ids.shape, hidden_size), torch.nan, dtype=model.dtype)
    hook = model.get_decoder().register_forward_pre_hook(reached, with_kwargs=True)
    try:
        model(**{name: value.to(model.device) for name, value in inputs.items()})
    except _Reached:
        pass
    finally:
        hook.remove()
        del embedding.forward
    return given


def _from_starts(positions: torch.Tensor, stands: torch.Tensor) -> torch.Tensor:
    """Positions [3, features] of features, each counted from the position after the last token of text before.

    Args:
        positions: of all tokens, [3, length].
        stands: which tokens stand for features, [length].
    """
    found, following = [], 0
    _, lengths = torch.unique_consecutive(stands, return_counts=True)
    start = 0
    for length in lengths.tolist():
        part = positions[:, start : start + length]
        if stands[start]:
            found.append(part - following)
        following = int(part.max()) + 1
        start += length
    return torch.cat(found, dim=1)


def counted(rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which tokens of rows [rows, length] have a next token that a model can be asked to predict, bool.

    Not those before a feature, whose token only stands for it. The last of a row counts.
    """
    following = nn.functional.pad(rows[:, 1:], (0, 1))
    return following < vocab_size


def embedded(checkpoint: Checkpoint, rows: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Rows [rows, length] of ids by an embedding [vocab_size, hidden_size], and by a checkpoint's towers."""
    if checkpoint.features is None:
        return nn.functional.embedding(rows, embedding)
    return checkpoint.features.embedded(rows, embedding)


def beside_embeddings(checkpoint: Checkpoint, rows: torch.Tensor | None, layer: int | None = None) -> dict[str, Any]:
    """What a decoder of a checkpoint takes beside the embeddings of rows of ids; see `Features.arguments`."""
    if checkpoint.features is None or rows is None:
        return {}
    return checkpoint.features.arguments(rows, layer)


def decoder_inputs(checkpoint: Checkpoint, model: Any, rows: torch.Tensor) -> dict[str, Any]:
    """What the decoder of a whole model takes for rows [rows, length] of ids, on the model's device.

    Args:
        checkpoint: has the towers, and the other weights of the model or those that it began with.
        model: a causal language model of `transformers`.
        rows: ids.
    """
    if checkpoint.features is None or not bool((rows >= checkpoint.shape.vocab_size).any()):
        return {"input_ids": rows}
    embedding = model.get_decoder().get_input_embeddings().weight
    return {"inputs_embeds": embedded(checkpoint, rows, embedding), **beside_embeddings(checkpoint, rows)}


def with_features_of(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A checkpoint that sees the images and hears the sounds that another of the run does, by its own towers."""
    if other.features is not None:
        checkpoint.features = other.features.of(checkpoint)
    return checkpoint
