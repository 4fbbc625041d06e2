"""The tree of a run's checkpoints, and its picture as rows with rails beside them."""

from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import Any

from autoglm_compress.records.files import SOURCE, SOURCE_FOLDER_NAME
from autoglm_compress.records.metrics import Row
from autoglm_compress.records.stage import Shape
from autoglm_compress.report.numbers import human, size
from autoglm_compress.report.run_record import Run


def checkpoints(run: Run) -> list[Row]:
    """The rows that have a checkpoint of their own: of stages that made one, and the source."""
    made = {name: stage.makes for name, stage in run.stages.items()}
    # Older versions left no record of evaluations.
    return [row for row in run.rows if made.get(row.name, row.stage) not in ("measurement", "artifact", "evaluate")]


def parents(run: Run) -> dict[str, str | None]:
    """The parent of each checkpoint; the previous checkpoint if no record names a parent."""
    found: dict[str, str | None] = {}
    previous = None
    for row in checkpoints(run):
        stage = run.stages.get(row.name)
        named = stage.parent if stage else None
        named = SOURCE if named == SOURCE_FOLDER_NAME else named
        found[row.name] = named if named in found else previous
        previous = row.name
    return found


def final_checkpoints(run: Run) -> list[Row]:
    """Checkpoints without children, except the source."""
    used = set(parents(run).values())
    return [row for row in checkpoints(run) if row.name not in used and row.stage != SOURCE]


@dataclass(frozen=True)
class Badge:
    """A few words on a checkpoint, and whether they differ from those on the one it was made from."""

    text: str
    changed: bool


@dataclass(frozen=True)
class Box:
    """A checkpoint in the picture.

    `lane` is where its dot is; `above` and `below` are the lanes with a rail in the upper and in the lower half of its
    row, `curve` is the lane that it branches off from.
    """

    row: Row
    badges: list[Badge]
    size: str
    share: float
    lane: int
    above: list[int]
    below: list[int]
    curve: int | None


def boxes(run: Run) -> list[Box]:
    """The picture of a run, row by row. The last child of a checkpoint stays in its lane; other children branch off."""
    rows, parent_of = checkpoints(run), parents(run)
    by_name = {row.name: row for row in rows}
    largest = max((row.bytes or 0 for row in rows), default=0)
    pending = Counter(parent for parent in parent_of.values() if parent)
    lane_of: dict[str, int] = {}
    open_lanes: dict[int, str] = {}
    found = []
    for row in rows:
        parent = parent_of[row.name]
        above, curve = sorted(open_lanes), None
        if parent is None:
            lane = next(lane for lane in count() if lane not in open_lanes)
        else:
            pending[parent] -= 1
            lane = lane_of[parent]
            if pending[parent]:
                curve, lane = lane, next(other for other in count(lane + 1) if other not in open_lanes)
        lane_of[row.name] = lane
        open_lanes.pop(lane, None)
        if pending[row.name]:
            open_lanes[lane] = row.name
        before = by_name[parent].shape if parent else None
        found.append(
            Box(
                row=row,
                badges=_badges(row.shape, before),
                size=" · ".join(_sizes(row)),
                share=(row.bytes or 0) / largest if largest else 0.0,
                lane=lane,
                above=above,
                below=sorted(open_lanes),
                curve=curve,
            )
        )
    return found


def _sizes(row: Row) -> list[str]:
    found = [f"{human(row.parameters)} parameters"] if row.parameters is not None else []
    return found + ([size(row.bytes)] if row.bytes is not None else [])


def _badges(shape: Shape, before: Shape | None) -> list[Badge]:
    now, then = _words(shape), _words(before) if before else {}
    return [Badge(text, before is not None and then.get(kind) != text) for kind, text in now.items()]


def _words(shape: Shape) -> dict[str, str]:
    """A shape in a few words, by topic. Unknown sizes are left out."""
    heads = f"{shape.num_attention_heads} heads"
    if shape.num_key_value_heads is not None:
        heads += f", {shape.num_key_value_heads} KV"
    tied = "tied" if shape.tie_word_embeddings else "untied"
    words = {
        "layers": (shape.num_hidden_layers, f"{shape.num_hidden_layers} layers"),
        "hidden": (shape.hidden_size, f"{shape.hidden_size} wide"),
        "ffn": (shape.intermediate_size, f"FFN {shape.intermediate_size}"),
        "heads": (shape.num_attention_heads, heads),
        "vocabulary": (shape.vocab_size, f"vocabulary {shape.vocab_size}"),
        "tied": (shape.tie_word_embeddings, tied),
        "adapter": (shape.shared_adapter, "shared adapter"),
        "bits": (shape.quantization or shape.dtype, precision(shape)),
    }
    return {kind: text for kind, (value, text) in words.items() if value is not None}


def precision(shape: Shape) -> str:
    """The dtype of a checkpoint, or the bits and groups of its integers, in words."""
    if not shape.quantization:
        return str(shape.dtype)
    bits = _each(shape.quantization.get("bits"))
    groups = _each([group for value in _sizes_of_groups(shape.quantization) for group in _list(value)])
    named = " and ".join(f"INT{width}" for width in bits) or "quantized"
    groups = [group for group in groups if group != "-1"]  # a scale per output channel
    return named + (f", groups of {'/'.join(groups)}" if groups else "")


def _sizes_of_groups(quantization: dict[str, Any]) -> list[Any]:
    groups = quantization.get("group_sizes")
    return list(groups.values()) if isinstance(groups, dict) else _list(groups)


def _each(value: Any) -> list[str]:
    """Different numbers among those given, smallest first."""
    return [str(number) for number in sorted({number for number in _list(value) if isinstance(number, int)})]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
