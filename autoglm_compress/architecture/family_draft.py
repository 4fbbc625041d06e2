"""A draft of a family's YAML for an unknown architecture, from the names and sizes of its tensors."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

LAYER = re.compile(r"(?P<prefix>(?:.+\.)?)layers\.(?P<number>\d+)\.(?P<name>.+)")
LAYER_ROLES = {
    "attention.query": ("self_attn.q_proj", ("query", "hidden")),
    "attention.key": ("self_attn.k_proj", ("key_value", "hidden")),
    "attention.value": ("self_attn.v_proj", ("key_value", "hidden")),
    "attention.output": ("self_attn.o_proj", ("hidden", "query")),
    "ffn.gate": ("mlp.gate_proj", ("intermediate", "hidden")),
    "ffn.up": ("mlp.up_proj", ("intermediate", "hidden")),
    "ffn.gate_up": ("mlp.gate_up_proj", ("gate_up", "hidden")),
    "ffn.down": ("mlp.down_proj", ("hidden", "intermediate")),
}
MODEL_ROLES = {
    "embedding": ("embed_tokens", ("vocab", "hidden")),
    "final_norm": ("norm", ("hidden",)),
    "head": ("lm_head", ("vocab", "hidden")),
}
ALTERNATIVES = {"ffn.gate", "ffn.up"}, {"ffn.gate_up"}
BY_HAND = (
    "layer_tensors: the order in which they are used",
    "smoothing: which linears read each norm",
    "writer_norms: norms between a linear and the residual stream",
    "when: the switch of the config for tensors that are there only with it, as biases often are",
)
"""Fields that shapes do not determine."""


@dataclass(frozen=True)
class KnownModel:
    """What the config and the files of an unknown model contain.

    Attributes:
        architecture: as in `config.json`.
        model_type: as in `config.json`.
        auto_class: the Auto class of `transformers` that has the architecture, None if none has.
        config: the part of `config.json` with the text tower's sizes, or `Family`'s ROOT.
        layers: the number of the text tower's layers.
        sizes: the lengths of the axes of families, by their names.
        tensors: the shapes of the tensors by their names in the files.
    """

    architecture: str
    model_type: str
    auto_class: str | None
    config: str
    layers: int
    sizes: Mapping[str, int]
    tensors: Mapping[str, tuple[int, ...]]


@dataclass
class FamilyDraft:
    """A partial family's YAML: the `fields` that are known, and the `missing` ones with the reason."""

    fields: dict[str, Any]
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        filled = yaml.safe_dump(self.fields, sort_keys=False, default_flow_style=None, width=110).rstrip()
        missing = "\n".join(f"  {entry}" for entry in (*self.missing, *BY_HAND))
        return f"Fields of a family's YAML that could be filled:\n{filled}\nNot filled:\n{missing}"


def draft_family(model: KnownModel) -> FamilyDraft:
    """The fields that names and sizes determine without doubt."""
    draft = FamilyDraft({"architecture": model.architecture, "model_type": model.model_type})
    if model.auto_class is None:
        draft.missing.append("auto_class: no Auto class of transformers for models that write text has it")
    else:
        draft.fields["auto_class"] = model.auto_class
    prefix, layers = _text_layers(model)
    if prefix is None:
        draft.missing.append(f"prefix: no tensors named PREFIX.layers.0 to {model.layers - 1} with a hidden size")
        draft.missing.append("roles, layer_tensors: without a prefix there are no layers to look at")
        return draft
    draft.fields |= {"prefix": prefix, "config": model.config}
    roles: dict[str, Any] = {"attention": {}, "ffn": {}}
    outside = {name: shape for name, shape in model.tensors.items() if not name.startswith(f"{prefix}layers.")}
    _fill_roles(draft, roles, MODEL_ROLES, outside, model.sizes)
    known = {f"{module}.weight" for module in roles.values() if isinstance(module, str)}
    if kept := {_tower(name) for name in outside if name not in known}:
        draft.fields["kept"] = {prefix.rstrip(".").rpartition(".")[2]: prefix for prefix in sorted(kept)}
    _fill_roles(draft, roles, LAYER_ROLES, layers[0], model.sizes)
    draft.fields["roles"] = {role: found for role, found in roles.items() if found}
    draft.fields["layer_tensors"] = dict(_layer_tensors(draft, layers[0], model.sizes))
    if others := [number for number, tensors in enumerate(layers) if tensors.keys() != layers[0].keys()]:
        draft.missing.append(f"layer_kinds, kinds: layer {others[0]} has other tensors than layer 0, which is shown")
    return draft


def _text_layers(model: KnownModel) -> tuple[str | None, list[dict[str, tuple[int, ...]]]]:
    """The prefix of the layers that have the text tower's width and number, and each one's tensors."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in model.tensors.items():
        if match := LAYER.fullmatch(name):
            found.setdefault(match["prefix"], {}).setdefault(int(match["number"]), {})[match["name"]] = shape
    fitting = [
        prefix
        for prefix, layers in found.items()
        if sorted(layers) == list(range(model.layers)) and (model.sizes["hidden"],) in layers[0].values()
    ]
    if len(fitting) != 1:
        return None, []
    return fitting[0], [found[fitting[0]][number] for number in range(model.layers)]


def _tower(name: str) -> str:
    """The prefix of the tower that a tensor outside the text tower belongs to."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "model" and len(parts) > 2 else 1]) + "."


def _fill_roles(
    draft: FamilyDraft,
    roles: dict[str, Any],
    usual: Mapping[str, tuple[str, tuple[str, ...]]],
    tensors: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
) -> None:
    """Give a role to a tensor that has its usual name and its shape."""
    absent = set()
    for role, (module, axes) in usual.items():
        expected = tuple(sizes[axis] for axis in axes)
        named = [name for name in tensors if f".{name}".endswith(f".{module}.weight") and tensors[name] == expected]
        if len(named) == 1:
            group, _, last = role.rpartition(".")
            (roles[group] if group else roles)[last] = named[0].removesuffix(".weight")
        else:
            absent.add(role)
    for one, other in (ALTERNATIVES, ALTERNATIVES[::-1]):
        if not one & absent:
            absent -= other  # gate and up are two, or one
    for role in (role for role in usual if role in absent):
        module, axes = usual[role]
        draft.missing.append(f"roles.{role}: not one {module} with [{', '.join(axes)}]")


def _layer_tensors(
    draft: FamilyDraft, tensors: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
) -> Iterator[tuple[str, list[str]]]:
    """The axes of each tensor of a layer: those of its role, or the only axes with its lengths."""
    usual = dict(LAYER_ROLES.values())
    for name, shape in tensors.items():
        module, _, kind = name.rpartition(".")
        axes = usual.get(module, ())[: 1 if kind == "bias" else None]
        if tuple(sizes[axis] for axis in axes) == shape:
            yield name, list(axes)
            continue
        found = [_axes_of_length(length, module, sizes) for length in shape]
        if all(len(axes) == 1 for axes in found):
            yield name, [axis for [axis] in found]
        else:
            draft.missing.append(f"layer_tensors.{name}: {list(shape)} are not the lengths of one axis each")


def _axes_of_length(length: int, module: str, sizes: Mapping[str, int]) -> list[str]:
    """The axes that may have a length; a norm beside attention and FFN runs along the residual stream."""
    if length == sizes["hidden"] and "." not in module:
        return ["hidden"]
    return [axis for axis, size in sizes.items() if size == length]
