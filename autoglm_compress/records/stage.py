"""`stage.json`: the decisions, files and costs of a finished stage."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from autoglm_compress.architecture import Family, ModelShape, Quantization
from autoglm_compress.architecture.shape import kv_cache_bytes
from autoglm_compress.records.files import Record, read_record

NOT_SIZES = ("architecture", "quantization", "shared_adapter")


class Shape(Record):
    """The sizes of a checkpoint, named as in `config.json`; `shared_adapter` is only there where it is true."""

    architecture: str | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    quantization: dict[str, Any] | None = None
    shared_adapter: bool | None = None

    @classmethod
    def of(cls, shape: ModelShape) -> "Shape":
        """The sizes of a model."""
        sizes = {name: getattr(shape, name) for name in cls.model_fields if name not in NOT_SIZES}
        if shape.shared_adapter:
            sizes["shared_adapter"] = True
        quantization = None if shape.quantization is None else _quantization(shape.quantization, shape.family)
        return cls(architecture=shape.family.architecture, **sizes, quantization=quantization)

    def kv_cache_bytes(self, tokens: int) -> int | None:
        """Bytes of a 16-bit key-value cache for so many tokens."""
        layers, heads, size = self.num_hidden_layers, self.num_key_value_heads, self.head_dim
        if layers is None or heads is None or size is None:
            return None
        return kv_cache_bytes(layers, heads, size, tokens)


def _quantization(quantization: Quantization, family: Family) -> dict[str, Any]:
    """A quantization as plain data; `bits` and `group_sizes` by linear, a list where it differs between layers."""
    by_linear = quantization.by_linear(family)

    def one_or_all(values: list[int]) -> int | list[int]:
        return values[0] if len(values) == 1 else values

    return {
        "format": quantization.format,
        "symmetric": all(scheme.symmetric for scheme in quantization.schemes.values()),
        "bits": one_or_all(sorted({scheme.bits for scheme in quantization.schemes.values()})),
        "bits_by_linear": {name: one_or_all(sorted({s.bits for s in found})) for name, found in by_linear.items()},
        "group_sizes": {name: one_or_all(sorted({s.group_size for s in found})) for name, found in by_linear.items()},
    }


class FileRecord(Record):
    """Size and SHA-256 of a file, and of a source's files the time of their last change in nanoseconds."""

    bytes: int
    mtime_ns: int | None = None
    sha256: str


class StageRecord(Record):
    """`stage.json`.

    `makes` is the kind of result. `files` are all files of the result except this record. `dropped` says that the
    weights among them were deleted later. `left_out` are tensors of the source that the model does not use, `linears`
    has measures of single linears for tables. Time is in seconds, memory and disk traffic in bytes.
    """

    name: str | None = None
    key: str | None = None
    makes: Literal["checkpoint", "artifact", "measurement"] = "checkpoint"
    options: dict[str, Any] = Field(default_factory=dict)
    parent: str | None = None
    shape_before: Shape | None = None
    shape: Shape | None = None
    decisions: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    left_out: list[str] = Field(default_factory=list)
    linears: list[dict[str, Any]] = Field(default_factory=list)
    files: dict[str, FileRecord] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seconds: float | None = None
    processes: int | None = None
    cpu_seconds: float | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    peak_rss_bytes: int | None = None
    dropped: bool = False

    def incomplete(self, folder: Path) -> list[str]:
        """The files of the result that are not in its folder, or not with all their bytes."""
        return [
            name
            for name, file in self.files.items()
            if not (folder / name).exists() or (folder / name).stat().st_size != file.bytes
        ]


def read_stage(path: Path) -> StageRecord:
    """Read a `stage.json`.

    Raises:
        UserError: the file cannot be read, is not JSON or not as the schema has it.
    """
    return read_record(StageRecord, path)
