"""What the folder of a run says about it; fields that older versions did not write may be absent."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoglm_compress.architecture.shape import kv_cache_bytes
from autoglm_compress.comparison.mmlu_scores import MmluScores, Scores
from autoglm_compress.errors import UserError

SOURCE = "source"
SOURCE_FILE = "00-source"
"""The source's name where it stands among stages: in `evaluations/`, and as a parent."""
AGAIN = "Run the recipe again with the same --output: finished stages are kept, and the file is written anew."


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Shape(_Record):
    """The sizes of a checkpoint, named as in `config.json`."""

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

    def kv_cache_bytes(self, tokens: int) -> int | None:
        """Bytes of a 16-bit key-value cache for so many tokens."""
        sizes = (self.num_hidden_layers, self.num_key_value_heads, self.head_dim)
        return None if None in sizes else kv_cache_bytes(*sizes, tokens)


Mmlu = MmluScores[Scores]
"""The result of the task `mmlu`; its questions are in `evaluations/`."""


class Row(_Record):
    """A row of `metrics.json`: the source, or a stage."""

    name: str
    stage: str
    shape: Shape = Shape()
    parameters: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)
    mmlu: Mmlu | None = None

    @property
    def label(self) -> str:
        """The name without its number."""
        number, _, label = self.name.partition("-")
        return label if number.isdigit() and label else self.name


class Metrics(_Record):
    """`metrics.json`."""

    recipe: str
    stages: list[Row] = Field(min_length=1)


class Stage(_Record):
    """A `stage.json`; `record` is all of it."""

    options: dict[str, Any] = Field(default_factory=dict)
    parent: str | None = None
    decisions: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    linears: list[dict[str, Any]] = Field(default_factory=list)
    record: dict[str, Any] = Field(default_factory=dict)


class Resources(_Record):
    """What work cost."""

    seconds: float | None = None
    peak_rss_bytes: int | None = None


class Evaluation(_Record):
    """A file of `evaluations/`, as far as `metrics.json` does not have it."""

    resources: Resources = Resources()


class Origin(_Record):
    """Where the source is, in a manifest."""

    folder: str | None = None


class Manifest(_Record):
    """`manifest.json`."""

    recipe: dict[str, Any] = Field(default_factory=dict)
    source: Origin = Origin()
    device: str | None = None
    threads: int | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    written: str | None = None


@dataclass(frozen=True)
class Run:
    """A run: its rows in order, and by the name of a row its `stage.json` and its evaluation."""

    folder: Path
    recipe: str
    rows: list[Row]
    manifest: Manifest
    stages: dict[str, Stage]
    evaluations: dict[str, Evaluation]

    @property
    def source(self) -> Row | None:
        """The row of the source."""
        return next((row for row in self.rows if row.stage == SOURCE), None)


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        UserError: it is not one, no stage of it is finished, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a folder that `autoglm-compress run` wrote.")
    metrics_file, manifest_file = folder / "metrics.json", folder / "manifest.json"
    if not metrics_file.exists():
        hint = (
            "no stage of this run is finished yet. Run the recipe first."
            if manifest_file.exists()
            else "not the folder of a run. Give a folder that `autoglm-compress run` wrote."
        )
        raise UserError(f"{metrics_file}: no such file: {hint}")
    metrics = _read(Metrics, metrics_file)
    rows = [_with_mmlu(row, number, metrics_file) for number, row in enumerate(metrics.stages)]
    files = {row.name: SOURCE_FILE if row.name == SOURCE else row.name for row in rows}
    unsafe = [name for name in files if Path(name).name != name]
    if unsafe:
        raise UserError(f"{metrics_file}: stages: the name {unsafe[0]!r} is not that of a folder. {AGAIN}")
    stage_files = {name: folder / file / "stage.json" for name, file in files.items()}
    evaluation_files = {name: folder / "evaluations" / f"{file}.json" for name, file in files.items()}
    return Run(
        folder=folder,
        recipe=metrics.recipe,
        rows=rows,
        manifest=_read(Manifest, manifest_file) if manifest_file.exists() else Manifest(),
        stages={name: _read_stage(file) for name, file in stage_files.items() if file.exists()},
        evaluations={name: _read(Evaluation, file) for name, file in evaluation_files.items() if file.exists()},
    )


def _with_mmlu(row: Row, number: int, file: Path) -> Row:
    """A row with the result of its task `mmlu` checked, if it has one."""
    if "mmlu" not in row.evaluations:
        return row
    mmlu = _validated(Mmlu, row.evaluations["mmlu"], file, f"stages.{number}.evaluations.mmlu.")
    return row.model_copy(update={"mmlu": mmlu})


def _read_stage(file: Path) -> Stage:
    data = _json(file)
    return _validated(Stage, data, file).model_copy(update={"record": data})


Model = TypeVar("Model", bound=_Record)


def _read(model: type[Model], file: Path) -> Model:
    return _validated(model, _json(file), file)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}. {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}.") from None


def _validated(model: type[Model], data: Any, file: Path, prefix: str = "") -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors()[0]
        field = prefix + ".".join(map(str, found["loc"])) or "all of it"
        given = "absent" if found["type"] == "missing" else f"given {str(found['input'])[:60]!r}"
        expected = found["msg"].replace("Input should", "must")
        raise UserError(f"{file}: {field}: {given}: {expected[:1].lower()}{expected[1:]}. {AGAIN}") from None
