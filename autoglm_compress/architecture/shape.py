"""The shape of a model: everything `plan` needs to know, and the arithmetic on it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from autoglm_compress.architecture.family import Family
from autoglm_compress.architecture.quantization import Quantization, Scheme
from autoglm_compress.architecture.tower import Tower

CUT_SIZES = (
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
)
"""The sizes of a shape that surgeries change."""
BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
PARTS = ("embedding", "attention", "ffn", "norms", "head")


def name_of(dtype: Any) -> str:
    """The name of a torch dtype, given the dtype or its name in a config. `float32` for None."""
    return str(dtype or "float32").removeprefix("torch.")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a linear's weight as [out, in]."""
    rows, columns = shape
    return rows, columns


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model's text tower, named as in `config.json`, and those of the towers kept beside it.

    `layer_kinds` has the kind of each layer, where the family's kinds differ in tensors; it is empty elsewhere. After
    each of the `first_layers` a tower adds to the residual stream. `shared_adapter` says that the family's projections
    have equal values.
    """

    family: Family
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    dtype: str
    switches: frozenset[str]
    quantization: Quantization | None = None
    layer_kinds: tuple[str, ...] = ()
    kept: tuple[Tower, ...] = ()
    first_layers: int = 0
    shared_adapter: bool = False

    @classmethod
    def of(cls, family: Family, config: Any) -> "ModelShape":
        """The shape that the text tower's `transformers` config object (with its defaults filled in) describes."""
        conditions = {tensor.when for tensor in family.layer_tensors.values() if tensor.when}
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            family=family,
            num_hidden_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=config.vocab_size,
            tie_word_embeddings=bool(config.tie_word_embeddings) and family.transformers_ties,
            dtype=name_of(config.dtype),
            switches=frozenset(name for name in conditions if getattr(config, name, False)),
            layer_kinds=tuple(getattr(config, family.layer_kinds)) if family.layer_kinds else (),
        )

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of every quantized linear by its name in the model. Empty if the model is not quantized."""
        return self.quantization.schemes if self.quantization else {}

    def axis(self, name: str | int) -> int:
        """The length of an axis."""
        if isinstance(name, int):
            return name
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
            "head_dim": self.head_dim,
            "intermediate": self.intermediate_size,
            "gate_up": 2 * self.intermediate_size,
        }[name]

    @property
    def kinds_of_layers(self) -> tuple[int, ...]:
        """The first layer of each kind."""
        return tuple(sorted(self.layer_kinds.index(kind) for kind in set(self.layer_kinds))) or (0,)

    def with_layers(self, kept: Sequence[int]) -> "ModelShape":
        """The shape with only some of the layers."""
        kinds = tuple(self.layer_kinds[layer] for layer in kept) if self.layer_kinds else ()
        return replace(self, num_hidden_layers=len(kept), layer_kinds=kinds)

    def with_width(self, hidden_size: int) -> "ModelShape":
        """The shape with another residual stream, and towers that write to it."""
        kept = tuple(tower.with_width(self.hidden_size, hidden_size) for tower in self.kept)
        return replace(self, hidden_size=hidden_size, kept=kept)

    @property
    def cut_sizes(self) -> dict[str, int]:
        """The sizes that surgeries change, by name."""
        return {name: getattr(self, name) for name in CUT_SIZES}

    def with_sizes(self, sizes: Mapping[str, int]) -> "ModelShape":
        """The shape with all `cut_sizes` given, of a model whose layers are alike."""
        narrowed = self.with_layers(range(sizes["num_hidden_layers"])).with_width(sizes["hidden_size"])
        return replace(
            narrowed,
            intermediate_size=sizes["intermediate_size"],
            num_attention_heads=sizes["num_attention_heads"],
            num_key_value_heads=sizes["num_key_value_heads"],
        )

    def layer_tensors(self, layer: int = 0) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, by their names relative to it."""
        kind = self.layer_kinds[layer] if self.layer_kinds else None
        return {
            name: tuple(self.axis(axis) for axis in tensor.axes)
            for name, tensor in self.family.layer_tensors.items()
            if (tensor.when is None or tensor.when in self.switches) and (tensor.kinds is None or kind in tensor.kinds)
        }

    def layer_linears(self, layer: int = 0) -> dict[str, tuple[int, int]]:
        """The linears of one layer, by their names relative to it, in the order in which they run, as [out, in]."""
        tensors = self.layer_tensors(layer)
        names = (f"{linear}.weight" for linear in self.family.layer_linears)
        return {name.removesuffix(".weight"): matrix_shape(tensors[name]) for name in names if name in tensors}

    def layer_elements(self, layer: int = 0) -> int:
        """The number of parameters of one layer."""
        return sum(prod(shape) for shape in self.layer_tensors(layer).values())

    def model_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors outside the layers; the head is absent where it is the embedding."""
        return {
            name: tuple(self.axis(axis) for axis in tensor.axes)
            for name, tensor in self.family.model_tensors.items()
            if not (self.tie_word_embeddings and name == self.family.head)
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the (unquantized) text tower with its shape."""
        yield from self.model_tensors().items()
        for layer in range(self.num_hidden_layers):
            prefix = self.family.layer_prefix(layer)
            yield from ((prefix + name, shape) for name, shape in self.layer_tensors(layer).items())

    def linear_shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The linears of all layers by their names in the model, with the shape [out, in] of each."""
        for layer in range(self.num_hidden_layers):
            prefix = self.family.layer_prefix(layer)
            yield from ((prefix + linear, shape) for linear, shape in self.layer_linears(layer).items())

    def parameters_by_part(self) -> dict[str, int]:
        """Parameter counts by part, kept towers by name; a tied matrix counts once, as the embedding."""
        counts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
        for name, shape in self.tensors():
            counts[self._part(name)] += prod(shape)
        return dict(counts) | {tower.name: tower.parameters for tower in self.kept}

    def _part(self, name: str) -> str:
        if name == self.family.embedding:
            return "embedding"
        if name == self.family.head:
            return "head"
        if name.endswith("norm.weight"):
            return "norms"
        block = self.family.place(name).name.rpartition(".")[0].rpartition(".")[0]
        parts = {self.family.attention_output: "attention", self.family.mlp_output: "ffn"}
        return next((part for writer, part in parts.items() if block == writer.rpartition(".")[0]), "other")

    @property
    def parameters(self) -> int:
        """The number of parameters; a tied matrix counts once."""
        return sum(self.parameters_by_part().values())

    def projection(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The tensors of the linear that writes the features of a type of parts, by their names relative to it."""
        prefix = f"{self.family.projections[kind].linear}."
        tensors = (tensor for tower in self.kept for tensor in tower.tensors)
        return {each.name.removeprefix(prefix): each.shape for each in tensors if each.name.startswith(prefix)}

    @property
    def adapter_towers(self) -> tuple[str, ...]:
        """The names of the kept towers that hold the family's projections, each once."""
        linears = (each.linear for each in self.family.projections.values())
        return tuple(dict.fromkeys(self.family.place(linear).tower for linear in linears))

    @property
    def unique_parameters(self) -> int:
        """The number of parameters, where a shared adapter counts once although it is stored for each type of parts."""
        if not self.shared_adapter:
            return self.parameters
        one = sum(map(prod, self.projection(next(iter(self.family.projections))).values()))
        return self.parameters - (len(self.family.projections) - 1) * one

    @property
    def element_bytes(self) -> int:
        """Bytes of one unquantized parameter."""
        return BYTES_PER_ELEMENT[self.dtype]

    def layer_bytes(self, layer: int = 0) -> int:
        """Bytes of one layer's tensors in the checkpoint."""
        prefix = self.family.layer_prefix(layer)
        return sum(self._stored_bytes(prefix + name, shape) for name, shape in self.layer_tensors(layer).items())

    def _stored_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        module = name.removesuffix(".weight")
        if self.quantization is not None and module != name and module in self.quantization.schemes:
            return self.quantization.matrix_bytes(module, matrix_shape(shape), self.element_bytes)
        return prod(shape) * self.element_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the checkpoint, without the few of the safetensors headers."""
        text = sum(self._stored_bytes(name, shape) for name, shape in self.tensors())
        return text + sum(tower.bytes for tower in self.kept)

    @property
    def widest_input(self) -> int:
        """The number of inputs of the layers' widest linear."""
        return max(columns for _, (_, columns) in self.linear_shapes())

    def kv_cache_bytes(self, tokens: int = 1000) -> int:
        """Bytes of a 16-bit key-value cache for so many tokens."""
        return kv_cache_bytes(self.num_hidden_layers, self.num_key_value_heads, self.head_dim, tokens)


def kv_cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Bytes of a 16-bit key-value cache: a key and a value of two bytes per element, for each layer and head."""
    return 2 * 2 * layers * kv_heads * head_dim * tokens
