"""The shape of a model: everything `plan` needs to know, and the arithmetic on it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from autoglm_compress.architecture.family import Family
from autoglm_compress.architecture.quantization import Quantization

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
PARTS = ("embedding", "attention", "ffn", "norms", "head")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only model, named as in `config.json`."""

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

    @classmethod
    def of(cls, family: Family, config: Any) -> "ModelShape":
        """The shape that a `transformers` config object (with its defaults filled in) describes."""
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
            tie_word_embeddings=bool(config.tie_word_embeddings),
            dtype=str(config.dtype or "float32").removeprefix("torch."),
            switches=frozenset(name for name in conditions if getattr(config, name, False)),
        )

    def axis(self, name: str) -> int:
        """The length of an axis."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
            "head_dim": self.head_dim,
            "intermediate": self.intermediate_size,
            "gate_up": 2 * self.intermediate_size,
        }[name]

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, by their names relative to it."""
        return {
            name: tuple(self.axis(axis) for axis in tensor.axes)
            for name, tensor in self.family.layer_tensors.items()
            if tensor.when is None or tensor.when in self.switches
        }

    def model_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors outside the layers; the head is absent where it is the embedding."""
        return {
            name: tuple(self.axis(axis) for axis in tensor.axes)
            for name, tensor in self.family.model_tensors.items()
            if not (self.tie_word_embeddings and name == self.family.head)
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the (unquantized) checkpoint with its shape."""
        yield from self.model_tensors().items()
        for layer in range(self.num_hidden_layers):
            prefix = self.family.layer_prefix(layer)
            yield from ((prefix + name, shape) for name, shape in self.layer_tensors().items())

    def linear_shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The linears of all layers by their names in the model, with the shape [out, in] of each."""
        tensors = self.layer_tensors()
        for layer in range(self.num_hidden_layers):
            prefix = self.family.layer_prefix(layer)
            yield from ((prefix + linear, tensors[f"{linear}.weight"]) for linear in self.family.layer_linears)

    def parameters_by_part(self) -> dict[str, int]:
        """Parameter counts by part; a tied matrix counts once, as the embedding."""
        counts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
        for name, shape in self.tensors():
            counts[self._part(name)] += prod(shape)
        return dict(counts)

    def _part(self, name: str) -> str:
        if name == self.family.embedding:
            return "embedding"
        if name == self.family.head:
            return "head"
        if name.endswith("norm.weight"):
            return "norms"
        return "attention" if ".self_attn." in name else "ffn"

    @property
    def parameters(self) -> int:
        """The number of parameters; a tied matrix counts once."""
        return sum(self.parameters_by_part().values())

    @property
    def element_bytes(self) -> int:
        """Bytes of one unquantized parameter."""
        return BYTES_PER_ELEMENT[self.dtype]

    def layer_bytes(self, layer: int = 0) -> int:
        """Bytes of one layer's tensors in the checkpoint."""
        prefix = self.family.layer_prefix(layer)
        return sum(self._stored_bytes(prefix + name, shape) for name, shape in self.layer_tensors().items())

    def _stored_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        module = name.removesuffix(".weight")
        if self.quantization is not None and module != name and module in self.quantization.schemes:
            return self.quantization.matrix_bytes(module, shape, self.element_bytes)
        return prod(shape) * self.element_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the checkpoint, without the few of the safetensors headers."""
        return sum(self._stored_bytes(name, shape) for name, shape in self.tensors())

    @property
    def widest_input(self) -> int:
        """Inputs of the layers' linear that has most."""
        tensors = self.layer_tensors()
        return max(tensors[f"{linear}.weight"][1] for linear in self.family.layer_linears)

    def kv_cache_bytes(self, tokens: int = 1000) -> int:
        """Bytes of a 16-bit key-value cache for so many tokens."""
        return kv_cache_bytes(self.num_hidden_layers, self.num_key_value_heads, self.head_dim, tokens)


def kv_cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Bytes of a 16-bit key-value cache: a key and a value of two bytes per element, for each layer and head."""
    return 2 * 2 * layers * kv_heads * head_dim * tokens


def resized_config(config: dict[str, Any], shape: ModelShape, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """A `config.json` for another shape of the same model.

    `layers` are the indices of the layers kept, for the settings that have an entry per layer. head_dim is always
    written: it no longer follows from hidden_size / num_attention_heads.
    """
    resized = dict(config)
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    ):
        resized[key] = getattr(shape, key)
    if config.get("max_window_layers"):
        resized["max_window_layers"] = min(config["max_window_layers"], shape.num_hidden_layers)
    if layers is not None and config.get("layer_types"):
        resized["layer_types"] = [config["layer_types"][layer] for layer in layers]
    return resized
