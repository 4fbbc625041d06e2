"""The picture of a stage's decisions, drawn from its `stage.json` alone, so that it can always be redrawn."""

from pathlib import Path

from autoglm_compress.figures import Record, as_svg
from autoglm_compress.progress import Progress
from autoglm_compress.records.stage import read_stage
from autoglm_compress.stages.registry import stage_types

PLOT = "plot.svg"


def draw_missing(stage_file: Path, progress: Progress) -> None:
    """Draw the plot of a finished stage beside its `stage.json`, unless it is there; say why if that fails."""
    file = stage_file.with_name(PLOT)
    if file.exists():
        return
    try:
        plot = draw(read_stage(stage_file).as_data())
        if plot is not None:
            temporary = file.with_name(f".{PLOT}.partial")
            temporary.write_bytes(plot)
            temporary.replace(file)
    except Exception as error:  # an error in a plot does not fail the stage or the run
        progress.note(f"warning: {stage_file.parent.name}: no {PLOT}: {type(error).__name__}: {error}")


def draw(record: Record) -> bytes | None:
    """An SVG of what a stage decided.

    None for a kind without a plot or that is not known here, and for a stage that had nothing to decide.

    Args:
        record: the content of `stage.json`.
    """
    kind = stage_types().get(record["options"]["stage"])
    return as_svg(lambda: kind.plot(record)) if kind and record["decisions"] else None
