"""A model family as data: `families/*.yaml` names every tensor and the axis each of its dimensions runs along.

Axes are `vocab`, `hidden` (the residual stream), `query` (query heads x head_dim), `key_value` (KV heads x head_dim),
`head_dim`, `intermediate` (FFN neurons) and `gate_up` (gate rows, then up rows, fused in one matrix); a number is a
length that no stage changes. Tensors of kept towers that depend on the text's width also have `inner`, neurons that are
as many as the residual stream has channels, or a multiple, and `tower`, a length of the tower's own. Knowing the axes
is enough to count parameters, to check a checkpoint's tensors and to cut a model along any of them.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

TOWER = "tower"
"""The axis of a bridge whose length is the tower's own."""
INNER = "inner"
"""The axis of neurons within a tower that are as many as the residual stream has channels, or a multiple."""
AXES = frozenset({"vocab", "hidden", "query", "key_value", "head_dim", "intermediate", "gate_up", TOWER, INNER})
TEXT = "text"
"""The name of the tower that stages work on. A family names the other towers, which stages copy unchanged."""
ROOT = "root"
"""The value of `config` if the text tower's settings are the whole `config.json`."""
FOLLOWED_BY: dict[str | int, str] = {"key_value": "query", "gate_up": "intermediate"}
"""For an axis that one linear writes, the axis that the next linear reads, where the two differ."""


def _ends_in_dot(prefix: str) -> str:
    if not prefix.endswith("."):
        raise ValueError("expected the beginning of tensor names with the dot that ends it, such as 'model.'")
    return prefix


Prefix = Annotated[str, AfterValidator(_ends_in_dot)]


class _Data(BaseModel):
    """Part of a family's YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorAxes(_Data):
    """The axes of one tensor, outermost first; a YAML may give these alone.

    `when` is the switch of the config (such as `attention_bias`) without which the tensor does not exist. `kinds` are
    the kinds of layers that have it, if not all do.
    """

    axes: tuple[str | Annotated[int, Field(gt=0)], ...]
    when: str | None = None
    kinds: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _axes_alone(cls, data: Any) -> Any:
        return {"axes": data} if isinstance(data, list | tuple) else data

    @field_validator("axes")
    @classmethod
    def _known(cls, axes: tuple[str | int, ...]) -> tuple[str | int, ...]:
        unknown = sorted(axis for axis in axes if isinstance(axis, str) and axis not in AXES)
        if unknown:
            raise ValueError(f"unknown axes {', '.join(unknown)}: known are {', '.join(sorted(AXES))}, or a number")
        return axes


class AttentionRoles(_Data):
    """The linears of attention, named relative to the layer."""

    query: str
    key: str
    value: str
    output: str


class FfnRoles(_Data):
    """The linears of the FFN, named relative to the layer. Gate and up are two linears, or one with fused rows."""

    down: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "FfnRoles":
        given = {role for role in ("gate", "up", "gate_up") if getattr(self, role) is not None}
        if given not in ({"gate", "up"}, {"gate_up"}):
            raise ValueError("expected gate and up, or gate_up alone")
        return self


class Roles(_Data):
    """The modules that every model has. Modules outside the layers have their full names."""

    embedding: str
    final_norm: str
    head: str
    attention: AttentionRoles
    ffn: FfnRoles


class Projection(_Data):
    """The linear by which a tower writes its features to the residual stream, and the modules that run before it.

    In `before`, `*` stands for the last of numbered modules.
    """

    linear: str
    before: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Place:
    """The place of a tensor or a module.

    `tower` is TEXT or the name of a kept tower, `layer` the number of the text tower's layer, None outside the layers,
    and `name` is relative to the layer, or all of the name outside the layers.
    """

    tower: str
    layer: int | None
    name: str


class Within(_Data):
    """Where a model stands in a larger one: the larger one's architectures, the part of its config, and a prefix."""

    architectures: tuple[str, ...] = Field(min_length=1)
    config: str
    prefix: Prefix


class Family(_Data):
    """One model family, as its YAML describes it.

    Attributes:
        architecture: as in `config.json`'s `architectures`.
        model_type: as in `config.json`.
        within: the larger model that the family's model may be stored as a part of; nothing else of it is read.
        auto_class: the Auto class of `transformers` that loads a checkpoint.
        prefix: the prefix of the text tower's layers, whose names begin with `{prefix}layers.N.`.
        config: the part of `config.json` with the text tower's settings, or ROOT.
        text_class: the class of `transformers` that the text tower alone has, where `AutoModel` does not find it.
        kept: the prefixes of towers that stages copy as they are, by the towers' names. A tensor belongs to the one
            whose prefix is longest.
        bridges: the tensors of kept towers that depend on the text tower's width, by full names in which `*` may stand
            for a number: those that write to the residual stream, and those with `inner` neurons. The neurons of
            linears and norms that share a module are one set.
        folded: two linears of a tower that follow on each other with nothing between them, the first named as a module
            outside the second's set.
        projections: by the type of a part (image, audio) the linear that writes its features, for models with both.
        kept_embeddings: the matrices of kept towers that no linear has, as names in which `*` may stand for anything.
        width_in_config: the settings outside the text tower's part of `config.json` that are its width, such as
            `vision_config.out_hidden_size`.
        first_layers: the list in `config.json` with an entry for each of the first layers after which a tower adds to
            the residual stream once more, such as `vision_config.deepstack_visual_indexes`.
        roles: which modules are what.
        layer_kinds: the list in the text tower's config that tells the kind of each layer, where kinds differ in
            tensors.
        layer_tensors: the tensors of a layer, named relative to it, in the order in which they are used.
        smoothing: for each producer of activations, the linears that are their only readers, in the order in which a
            layer runs. A scale per channel moves exactly from readers to producer. Readers that a kind of layer lacks
            are ignored for it.
        writer_norms: for a linear that writes to the residual stream, the norm between the two (sandwich norms).
        vllm_derives_head_dim: whether vLLM takes head_dim to be hidden_size / num_attention_heads.
        transformers_derives_head_dim: whether `transformers` does.
        transformers_ties: whether the head of a model of `transformers` can be its embedding.
    """

    architecture: str
    model_type: str
    within: Within | None = None
    auto_class: str = Field(default="AutoModelForCausalLM", pattern=r"^AutoModel\w*$")
    prefix: Prefix = "model."
    config: str = ROOT
    text_class: str | None = None
    kept: dict[str, Prefix] = Field(default_factory=dict)
    bridges: dict[str, TensorAxes] = Field(default_factory=dict)
    folded: tuple[str, str] | None = None
    projections: dict[str, Projection] = Field(default_factory=dict)
    kept_embeddings: tuple[str, ...] = ()
    width_in_config: tuple[str, ...] = ()
    first_layers: str | None = None
    roles: Roles
    layer_kinds: str | None = None
    layer_tensors: dict[str, TensorAxes] = Field(min_length=1)
    smoothing: dict[str, tuple[str, ...]]
    writer_norms: dict[str, str] = Field(default_factory=dict)
    vllm_derives_head_dim: bool = False
    transformers_derives_head_dim: bool = False
    transformers_ties: bool = True

    def __hash__(self) -> int:
        return hash(self.architecture)

    @model_validator(mode="after")
    def _consistent(self) -> "Family":
        for problem in (*_kind_problems(self), *_role_problems(self), *_smoothing_problems(self)):
            raise ValueError(problem)
        return self

    @property
    def embedding(self) -> str:
        """The embedding's tensor."""
        return f"{self.roles.embedding}.weight"

    @property
    def final_norm(self) -> str:
        """The tensor of the norm before the head."""
        return f"{self.roles.final_norm}.weight"

    @property
    def head(self) -> str:
        """The head's tensor. It does not exist where the embedding is the head."""
        return f"{self.roles.head}.weight"

    @property
    def attention_output(self) -> str:
        """The linear by which attention writes to the residual stream."""
        return self.roles.attention.output

    @property
    def mlp_output(self) -> str:
        """The linear by which the FFN writes to the residual stream."""
        return self.roles.ffn.down

    @cached_property
    def model_tensors(self) -> dict[str, TensorAxes]:
        """The text tower's tensors outside its layers, by full name."""
        axes = {self.embedding: ("vocab", "hidden"), self.final_norm: ("hidden",), self.head: ("vocab", "hidden")}
        return {name: TensorAxes(axes=given) for name, given in axes.items()}

    @cached_property
    def norm_readers(self) -> dict[str, tuple[str, ...]]:
        """For each norm of a layer, the linears that alone read its output."""
        return {name: readers for name, readers in self.smoothing.items() if self.axes_of_linear(name) == ("hidden",)}

    def axes_of_linear(self, module: str) -> tuple[str | int, ...]:
        """The axes of the weight of a layer's module, named relative to the layer."""
        return self.layer_tensors[f"{module}.weight"].axes

    def layer_prefix(self, layer: int) -> str:
        """The prefix of the names of one layer's tensors."""
        return f"{self.prefix}layers.{layer}."

    def place(self, name: str) -> Place:
        """The place of a tensor or a module, by its full name."""
        if holding := [tower for tower, prefix in self.kept.items() if name.startswith(prefix)]:
            return Place(max(holding, key=lambda tower: len(self.kept[tower])), None, name)
        layers = f"{self.prefix}layers."
        if name.startswith(layers):
            number, _, rest = name.removeprefix(layers).partition(".")
            if number.isdecimal() and rest:
                return Place(TEXT, int(number), rest)
        return Place(TEXT, None, name)

    def within_text(self, module: str) -> str:
        """The name that a module of the text tower has in a `transformers` model of this tower alone."""
        return module.removeprefix(self.prefix)

    def bridge(self, name: str) -> tuple[str | int, ...] | None:
        """The axes of a kept tower's tensor that depends on the text tower's width; None for all others."""
        return next((tensor.axes for pattern, tensor in self.bridges.items() if fnmatchcase(name, pattern)), None)

    def is_kept_embedding(self, name: str) -> bool:
        """Whether a matrix of a kept tower is looked up by rows and no linear's."""
        return any(fnmatchcase(name, pattern) for pattern in self.kept_embeddings)

    def axes_of(self, name: str) -> tuple[str | int, ...]:
        """The axes of a tensor of the text tower, or of a bridge to it, by its full name in the checkpoint."""
        place = self.place(name)
        if place.tower != TEXT:
            return self.bridge(name) or ()
        return (self.model_tensors if place.layer is None else self.layer_tensors)[place.name].axes

    @property
    def layer_linears(self) -> tuple[str, ...]:
        """The linear modules of layers, relative to them, in the order in which they run."""
        return tuple(n.removesuffix(".weight") for n, tensor in self.layer_tensors.items() if len(tensor.axes) == 2)

    @property
    def hidden_norms(self) -> tuple[str, ...]:
        """The norms of a layer that run along the residual stream, relative to it."""
        return tuple(
            n.removesuffix(".weight")
            for n, tensor in self.layer_tensors.items()
            if tensor.axes == ("hidden",) and n.endswith("norm.weight")
        )


def _kind_problems(family: Family) -> list[str]:
    if family.layer_kinds is not None:
        return []
    return [
        f"layer_tensors.{name}.kinds: given, but not layer_kinds: say which list of the config tells layers' kinds"
        for name, tensor in family.layer_tensors.items()
        if tensor.kinds is not None
    ]


def _role_problems(family: Family) -> list[str]:
    """Contradictions between the roles and the tensors."""
    attention, ffn = family.roles.attention, family.roles.ffn
    expected: dict[str, tuple[str | None, tuple[str, str]]] = {
        "attention.query": (attention.query, ("query", "hidden")),
        "attention.key": (attention.key, ("key_value", "hidden")),
        "attention.value": (attention.value, ("key_value", "hidden")),
        "attention.output": (attention.output, ("hidden", "query")),
        "ffn.gate": (ffn.gate, ("intermediate", "hidden")),
        "ffn.up": (ffn.up, ("intermediate", "hidden")),
        "ffn.gate_up": (ffn.gate_up, ("gate_up", "hidden")),
        "ffn.down": (ffn.down, ("hidden", "intermediate")),
    }
    problems = []
    for role, (module, axes) in expected.items():
        if module is None:
            continue
        tensor = family.layer_tensors.get(f"{module}.weight")
        if tensor is None or tensor.axes != axes:
            shown = "is not there" if tensor is None else f"has {_listed(tensor.axes)}"
            wanted = f"expected layer_tensors to have {module}.weight: {_listed(axes)}"
            problems.append(f"roles.{role}: {wanted}, which {shown}")
    return problems


def _smoothing_problems(family: Family) -> list[str]:
    """Smoothing pairs whose modules do not exist, or whose channels do not match one to one."""
    named = [(f"smoothing.{producer}", (producer, *readers)) for producer, readers in family.smoothing.items()]
    named += [(f"writer_norms.{linear}", (linear, norm)) for linear, norm in family.writer_norms.items()]
    problems = [
        f"{field}: {module}.weight is not in layer_tensors"
        for field, modules in named
        for module in modules
        if f"{module}.weight" not in family.layer_tensors
    ]
    if problems:
        return problems
    for producer, readers in family.smoothing.items():
        made = family.axes_of_linear(producer)[0]
        for reader in readers:
            axes = family.axes_of_linear(reader)
            if len(axes) != 2 or axes[1] != FOLLOWED_BY.get(made, made):
                problems.append(f"smoothing.{producer}: {reader} has {_listed(axes)} and does not read {made}")
    return problems


def _listed(axes: tuple[str | int, ...]) -> str:
    return f"[{', '.join(map(str, axes))}]"
