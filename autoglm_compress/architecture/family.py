"""A model family as data: `families/*.yaml` names every tensor and the axis each of its dimensions runs along.

Axes are `vocab`, `hidden` (the residual stream), `query` (query heads x head_dim), `key_value` (KV heads x head_dim),
`head_dim`, `intermediate` (FFN neurons) and `gate_up` (gate rows, then up rows, fused in one matrix). Knowing the axes
is enough to count parameters, to check a checkpoint's tensors and to cut a model along any of them.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from autoglm_compress.errors import UserError

AXES = frozenset({"vocab", "hidden", "query", "key_value", "head_dim", "intermediate", "gate_up"})


class UnsupportedArchitectureError(UserError):
    """A model of none of the families."""


@dataclass(frozen=True)
class TensorAxes:
    """The axes of one tensor, and the config switch (such as `attention_bias`) without which it does not exist."""

    axes: tuple[str, ...]
    when: str | None = None


@dataclass(frozen=True)
class Family:
    """One model family.

    `norm_readers` maps a norm to the linears that alone read its output; `writer_norms` maps a linear that writes to
    the residual stream to the norm standing between the two (sandwich norms). Names are relative to the layer.
    """

    architecture: str
    model_type: str
    model_tensors: dict[str, TensorAxes]
    layer_tensors: dict[str, TensorAxes]
    norm_readers: dict[str, tuple[str, ...]]
    writer_norms: dict[str, str] = field(default_factory=dict)
    vllm_derives_head_dim: bool = False

    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm.weight"
    head = "lm_head.weight"
    attention_output = "self_attn.o_proj"
    mlp_output = "mlp.down_proj"

    def __hash__(self) -> int:
        return hash(self.architecture)

    @staticmethod
    def layer_prefix(layer: int) -> str:
        """The prefix of the names of one layer's tensors."""
        return f"model.layers.{layer}."

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The axes of a tensor by its full name in the checkpoint."""
        if name in self.model_tensors:
            return self.model_tensors[name].axes
        return self.layer_tensors[name.split(".", 3)[3]].axes

    @property
    def layer_linears(self) -> tuple[str, ...]:
        """The linear modules of a layer, relative to it, in the order in which they run."""
        return tuple(n.removesuffix(".weight") for n, tensor in self.layer_tensors.items() if len(tensor.axes) == 2)

    @property
    def hidden_norms(self) -> tuple[str, ...]:
        """The norms of a layer that run along the residual stream, relative to it."""
        return tuple(
            n.removesuffix(".weight")
            for n, tensor in self.layer_tensors.items()
            if tensor.axes == ("hidden",) and n.endswith("norm.weight")
        )


def _tensor_axes(entry: Any) -> TensorAxes:
    tensor = TensorAxes(tuple(entry)) if isinstance(entry, list) else TensorAxes(tuple(entry["axes"]), entry["when"])
    unknown = set(tensor.axes) - AXES
    if unknown:
        raise ValueError(f"unknown axes {sorted(unknown)}; known are {sorted(AXES)}")
    return tensor


def _load(path: Path) -> Family:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    for group in ("model_tensors", "layer_tensors"):
        data[group] = {name: _tensor_axes(entry) for name, entry in data[group].items()}
    data["norm_readers"] = {norm: tuple(readers) for norm, readers in data["norm_readers"].items()}
    return Family(**data)


@cache
def _families() -> dict[str, Family]:
    folder = Path(__file__).parent / "families"
    families = [_load(path) for path in sorted(folder.glob("*.yaml"))]
    return {family.architecture: family for family in families}


def supported_architectures() -> list[str]:
    """The names, as in `config.json`'s `architectures`, of the families this package knows."""
    return sorted(_families())


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a model from its `config.json`.

    Raises:
        UnsupportedArchitectureError: the config names no architecture, or one that is not supported.
        UserError: its `model_type`, by which transformers builds the model, is that of another family.
    """
    names = config.get("architectures") or []
    for name in names:
        if name in _families():
            _require_model_type(config, _families()[name], where)
            return _families()[name]
    given = ", ".join(names) if names else f"none given (model_type {config.get('model_type')!r})"
    supported = ", ".join(supported_architectures())
    raise UnsupportedArchitectureError(f"{where}: unsupported architecture: {given}.\nSupported: {supported}.")


def _require_model_type(config: dict[str, Any], family: Family, where: str) -> None:
    given = config.get("model_type")
    if given != family.model_type:
        raise UserError(
            f"{where}: architectures names {family.architecture}, which has model_type {family.model_type}, but "
            f"model_type is {given!r}, and transformers would build that model. Correct the field that is wrong."
        )
