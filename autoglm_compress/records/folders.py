"""Folders that runs leave, found by the names that people give."""

from pathlib import Path

from autoglm_compress.errors import UserError
from autoglm_compress.records.files import MANIFEST, STAGE


def find_folder(given: Path) -> Path:
    """The folder that is meant by a path, or by a run and the label of one of its stages, such as `runs/demo/int4`.

    Raises:
        UserError: there is none, or it is a whole run.
    """
    if not given.is_dir():
        labelled = sorted(given.parent.glob(f"[0-9][0-9]-{given.name}"))
        if len(labelled) != 1:
            raise UserError(f"{given}: no such folder. Give a checkpoint, an export, or RUN/STAGE.")
        given = labelled[0]
    if (given / MANIFEST).exists():
        stages = [path.parent.name for path in given.glob(f"[0-9][0-9]-*/{STAGE}")]
        known = f"such as {given / max(stages)}" if stages else "but none is finished yet"
        raise UserError(f"{given}: is a whole run. Give one of its stages, {known}.")
    if any(part.startswith(".") and part.endswith(".work") for part in given.absolute().parts):
        raise UserError(f"{given}: is not finished. Run the same command again, and give the folder that it leaves.")
    return given
