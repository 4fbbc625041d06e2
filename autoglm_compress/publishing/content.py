"""What of a folder is uploaded: a whole checkpoint or a whole export, without the records of the run that made it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autoglm_compress.architecture import Family, require_used
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.source import CARD
from autoglm_compress.checkpoint.weight_files import INDEX
from autoglm_compress.errors import UserError, listed
from autoglm_compress.publishing.card import checkpoint_card
from autoglm_compress.publishing.history import history
from autoglm_compress.records.files import CHOSEN, EXPORT, LINEAGE, STAGE
from autoglm_compress.records.stage import StageRecord, read_stage

CHECKSUMS = "SHA256SUMS"
TEXTS = (CARD, "LICENSE*", "NOTICE*", "*.py")
"""What may stand beside a checkpoint that this package did not make: its card, its license, and its own code."""


@dataclass(frozen=True)
class Content:
    """Files by their paths in the repo, and a card for it where the folder has none."""

    files: dict[str, Path]
    card: str | None

    def sizes(self) -> dict[str, int]:
        """The bytes of each file, the card included, in order of their names."""
        found = {name: path.stat().st_size for name, path in self.files.items()}
        if self.card is not None:
            found[CARD] = len(self.card.encode())
        return dict(sorted(found.items()))


def content_of(folder: Path, repo: str, family: Family | None) -> Content:
    """What of a folder is uploaded.

    Args:
        folder: a checkpoint, or an export.
        repo: the id on the hub, for the card.
        family: describes the checkpoint, if its family is not a known one.

    Raises:
        UserError: it is neither, or it is not whole.
    """
    if (folder / STAGE).exists():
        return _of_stage(folder, repo, family)
    if (folder / EXPORT).exists():
        return _of_export(folder)
    checkpoint = _opened(folder, family)
    files = [folder / "config.json", folder / INDEX, *checkpoint.tokenizer_files(), *checkpoint.files()]
    files += [path for pattern in TEXTS for path in folder.glob(pattern)]
    return _content(folder, filter(Path.is_file, files), checkpoint, repo)


def _of_stage(folder: Path, repo: str, family: Family | None) -> Content:
    record = read_stage(folder / STAGE)
    _require_whole(folder, record)
    files = [folder / name for name in record.files if name not in (LINEAGE, CHOSEN)]
    if record.makes == "checkpoint":
        return _content(folder, files, _opened(folder, family), repo)
    if CARD not in record.files:
        raise UserError(f"{folder}: has no {CARD}: of results beside checkpoints, those with a card are uploaded.")
    return Content(_named(folder, files), None)


def _require_whole(folder: Path, record: StageRecord) -> None:
    if record.makes == "measurement":
        raise UserError(f"{folder}: holds measurements. Give a stage that made a checkpoint or an export.")
    if record.dropped:
        raise UserError(
            f"{folder}: the weights were deleted, as the recipe's keep says. Run it again with --set keep=all, or give "
            "another stage."
        )
    if missing := record.incomplete(folder):
        raise UserError(
            f"{folder}: {listed(missing)}: missing, or not as the stage left it. Run the recipe again: the stage is "
            "done again."
        )


def _of_export(folder: Path) -> Content:
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{folder}: no {CHECKSUMS}, which every export has. Export again.") from None
    names = [line.partition("  ")[2] for line in lines] + [CHECKSUMS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {listed(missing)}: missing. Export again.")
    return Content(_named(folder, (folder / name for name in names)), None)


def _opened(folder: Path, family: Family | None) -> Checkpoint:
    checkpoint = Checkpoint(folder, family)
    require_used(family, checkpoint.family, "--family", str(folder / "config.json"))
    return checkpoint


def _content(folder: Path, files: Iterable[Path], checkpoint: Checkpoint, repo: str) -> Content:
    named = _named(folder, files)
    return Content(named, None if CARD in named else checkpoint_card(checkpoint, repo, history(folder)))


def _named(folder: Path, files: Iterable[Path]) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path.absolute() for path in files}
