"""The folder that a run writes to: which recipe owns it, which stages are finished, where unfinished work is kept."""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path

from filelock import FileLock, Timeout

from autoglm_compress.atomic import write_json
from autoglm_compress.checkpoint.weight_files import INDEX
from autoglm_compress.errors import UserError
from autoglm_compress.records.files import EVALUATIONS, MANIFEST, STAGE, found, read_json
from autoglm_compress.records.manifest import Manifest
from autoglm_compress.records.stage import StageRecord

LOCK = ".lock"
REVISION = 2
"""The version of unfinished work. Raise it when newer code cannot continue the work of older code."""
UNOWNED = (LOCK, ".partial")
"""Endings of the file names that a run leaves if it is killed before it writes a manifest."""


def is_weights(name: str) -> bool:
    """Whether a file is deleted when the weights of its checkpoint are dropped."""
    return name.endswith(".safetensors") or name == INDEX


def disk_problem(folder: Path, error: OSError) -> str | None:
    """The message for an error while writing a run. None if the disk is not the cause: then it is a bug."""
    if error.errno in (ENOSPC, EDQUOT):
        return (
            f"{folder}: the disk is full. Free some space and give the same command again: it goes on where it "
            "stopped, and nothing is half-written."
        )
    return _no_writing(folder, error) if error.errno in (EACCES, EPERM, EROFS) else None


def _no_writing(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot write there: {error.strerror or error}. Give another folder with --output."


class RunFolder:
    """`manifest.json`, `metrics.json`, a folder per finished stage, and `.work` with what is unfinished.

    Raises:
        UserError: the folder holds something else than a run of this recipe.
    """

    def __init__(self, path: Path, recipe_name: str) -> None:
        self.path = path
        self.work = path / ".work"
        for place in (path, *path.parents):
            if place.exists() and not place.is_dir():
                where = f"{path}: is" if place == path else f"{path}: {place} is"
                raise UserError(f"{where} a file. Give a folder with --output.")
        self.manifest = found(Manifest, path / MANIFEST) or Manifest()
        owner = self.manifest.recipe.get("name")
        # A first run that was killed at once leaves a manifest under its temporary name.
        if owner is None and path.exists() and any(not entry.name.endswith(UNOWNED) for entry in path.iterdir()):
            raise UserError(f"{path}: not empty, and not the output of a run. Give another folder with --output.")
        if owner not in (None, recipe_name):
            raise UserError(
                f"{path}: belongs to the recipe {owner!r}, not {recipe_name!r}. "
                "Give another folder with --output, or delete this one."
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder against other runs, and create it if needed. The lock of a killed process does not hold.

        Raises:
            UserError: another run is at work there, or the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.path}: another run is at work there. Wait until it is done, stop it, or give another folder "
                "with --output."
            ) from None
        except OSError as error:
            raise UserError(_no_writing(self.path, error)) from None
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Delete what earlier runs of this recipe made."""
        for stage in self._stage_folders():
            shutil.rmtree(stage)
        for path in (self.work, self.path / EVALUATIONS):
            shutil.rmtree(path, ignore_errors=True)
        self.manifest = Manifest()

    def _stage_folders(self) -> list[Path]:
        return sorted(path.parent for path in self.path.glob(f"[0-9][0-9]-*/{STAGE}"))

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            manifest.write(self.path / MANIFEST)
        except OSError as error:
            raise UserError(_no_writing(self.path, error)) from None

    def adopt(self, names: Sequence[str], keys: Sequence[str]) -> list[Path]:
        """Rename finished stages to their present names in the recipe. Returns those that the recipe no longer has."""
        records = {folder: found(StageRecord, folder / STAGE) for folder in self._stage_folders()}
        placed = dict(zip(names, keys, strict=True))
        by_key = {
            record.key: folder
            for folder, record in records.items()
            if record and placed.get(folder.name) != record.key  # folders with the right name stay
        }
        moves = {
            by_key[key].name: name
            for name, key in zip(names, keys, strict=True)
            if key in by_key and by_key[key].name != name and not (self.path / name).exists()
        }
        self._rename_in_records(moves)
        for old, name in moves.items():
            (self.path / old).rename(self.path / name)
            results = self.path / EVALUATIONS / f"{old}.json"
            if results.exists():
                results.replace(results.with_name(f"{name}.json"))
        for summary in self.path.glob("[0-9][0-9]-*.json"):  # of evaluations, by older versions; results are kept
            summary.unlink()
        return [folder for folder in self._stage_folders() if folder.name not in names]

    def _rename_in_records(self, moves: dict[str, str]) -> None:
        """Write the present names of stages into their records. Reports use the names to link a checkpoint to its
        parent.
        """
        for folder in self._stage_folders() if moves else ():
            record = found(StageRecord, folder / STAGE)
            if record is not None:
                renamed = {
                    field: moves.get(getattr(record, field), getattr(record, field)) for field in ("name", "parent")
                }
                record.model_copy(update=renamed).write(folder / STAGE)

    def finished(self, name: str, key: str) -> StageRecord | None:
        """The `stage.json` of a stage that is finished with this key and whose files are all there.

        The weights may be missing if the record says that they were `dropped`.
        """
        if self._record(self.stage_result(name), key) is not None:
            self.publish(name)  # killed between the last write and the rename
        return self._record(self.path / name, key)

    @staticmethod
    def _record(folder: Path, key: str) -> StageRecord | None:
        record = found(StageRecord, folder / STAGE)
        if record is None or record.key != key:
            return None
        whole = all(record.dropped and is_weights(name) for name in record.incomplete(folder))
        return record if whole else None

    def stage_work(self, name: str) -> Path:
        """Where a stage works. `result/` becomes the stage's folder; `scratch/` is deleted afterwards."""
        return self.work / name

    def stage_result(self, name: str) -> Path:
        """The folder that becomes the stage's folder."""
        return self.stage_work(name) / "result"

    def begin(self, name: str, key: str, versions: dict[str, str]) -> tuple[Path, bool]:
        """The work folder of a stage, and whether it holds work of a killed run that can be continued.

        Work by other package versions cannot be continued, so that one checkpoint never mixes versions.
        """
        folder, wanted = self.stage_work(name), {"key": key, "versions": versions, "revision": REVISION}
        resumed = read_json(folder / "key.json") == wanted
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "scratch").mkdir(parents=True)
            self.stage_result(name).mkdir()
            write_json(folder / "key.json", wanted)
        return folder, resumed

    def publish(self, name: str) -> Path:
        """Turn a complete result into the stage's folder, replacing an older one."""
        final, old = self.path / name, self.work / f"{name}.old"
        (self.stage_work(name) / "key.json").unlink(missing_ok=True)  # from here on, there is nothing left to continue
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        self.stage_result(name).rename(final)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.stage_work(name))
        return final

    def drop(self, name: str, record: StageRecord) -> StageRecord:
        """Delete the weights of a finished stage and keep its records.

        `record` is its `stage.json`. Returns the new record.
        """
        folder, dropped = self.path / name, record.model_copy(update={"dropped": True})
        if not record.dropped:
            dropped.write(folder / STAGE)
        for file in filter(is_weights, record.files):
            (folder / file).unlink(missing_ok=True)
        return dropped

    def tidy(self, needed: Collection[str]) -> None:
        """Delete leftover work, except what is still needed."""
        for path in self.work.glob("*"):
            if path.is_dir() and path.name not in needed:
                shutil.rmtree(path)
