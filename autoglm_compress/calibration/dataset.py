"""Text that the `datasets` library streams, from the Hugging Face hub or from a folder."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from autoglm_compress.atomic import appearing
from autoglm_compress.errors import UserError
from autoglm_compress.hashing import key_of

COMMIT = re.compile(r"[0-9a-f]{40}")


class Dataset(BaseModel):
    """A dataset by its name on the hub or its folder, and the column that holds the text (`field` is another word).

    A healing that is finished is not done again because the dataset changed: nobody looks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    column: str = Field(default="text", validation_alias=AliasChoices("column", "field"))

    @model_validator(mode="before")
    @classmethod
    def _one_column(cls, given: Any) -> Any:
        if isinstance(given, dict) and {"column", "field"} <= given.keys():
            raise ValueError("column and field are two words for the same: give one of them")
        return given


class DatasetSource(Dataset):
    """A dataset as calibration text: its first `documents`, of one revision on the hub (None: the latest)."""

    revision: str | None = None
    documents: Annotated[int, Field(strict=True, gt=0)] = 10_000


def streamed(options: Dataset, option: str, place: str | None = None, revision: str | None = None) -> Iterator[str]:
    """The texts of a dataset, fetched when their turn comes.

    Args:
        options: which dataset.
        option: what a recipe calls it, for messages.
        place: the folder or name to load, if not the one in the options.
        revision: on the hub.

    Raises:
        UserError: the dataset, its split or its column is not there, or the column does not hold text. Rows without a
            value are left out.
    """
    from datasets import load_dataset

    where, column = f"{option}: {options.dataset}", options.column
    try:
        rows = load_dataset(
            place or options.dataset, options.subset, split=options.split, revision=revision, streaming=True
        )
        for number, row in enumerate(rows):
            if number == 0 and column not in row:
                raise UserError(f"{where}: no column {column!r}; there are {', '.join(row)}.")
            text = row.get(column)
            if isinstance(text, str):
                yield text
            elif text is not None:
                kind = type(text).__name__
                raise UserError(f"{where}: row {number + 1}: column {column!r} holds a value of type {kind}, not text.")
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds; the user needs one sentence
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: cannot be streamed: {reason}") from None


def fetched(options: DatasetSource, bases: Sequence[Path]) -> Path:
    """A file with the texts of a dataset, one JSON object a line, which is made once for each revision.

    It is in `autoglm-compress` below `$XDG_CACHE_HOME` or `~/.cache`. What depends on the text is known by the hash of
    this file, and so by the dataset's revision.

    Args:
        options: the dataset, and how much of it.
        bases: the folders in which a relative path is looked up, in order. What is in none of them is on the hub.

    Raises:
        UserError: the dataset cannot be reached, has no text, or the file cannot be written.
    """
    folder = next((base / options.dataset for base in bases if (base / options.dataset).is_dir()), None)
    revision = _revision(options) if folder is None else None
    place = options.dataset if folder is None else str(folder.resolve())
    known = [place, revision or _state(Path(place)), options.subset, options.split, options.column, options.documents]
    name = f"{re.sub(r'[^A-Za-z0-9.-]+', '-', options.dataset).strip('-.')}-{key_of(known)}.jsonl"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoglm-compress"
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):  # the processes of a run all ask
            if not (cache / name).exists():
                _write(
                    cache / name, islice(streamed(options, "calibration.source", place, revision), options.documents)
                )
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"calibration.source: {options.dataset}: cannot be kept in {cache}: {reason}.") from None
    if (cache / name).stat().st_size == 0:
        raise UserError(f"calibration.source: {options.dataset}: split {options.split!r} has no text.")
    return cache / name


def _write(file: Path, texts: Iterator[str]) -> None:
    with appearing(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def _revision(options: DatasetSource) -> str:
    """The commit of a dataset on the hub."""
    if options.revision is not None and COMMIT.fullmatch(options.revision):
        return options.revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(options.dataset, revision=options.revision).sha)
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"calibration.source: no folder {options.dataset!r}, and the hub did not give this dataset: {reason}\n"
            "Check the name and the network, or give a folder. With the 40 digits of a commit as revision: what was "
            "fetched once needs no network."
        ) from None


def _state(folder: Path) -> list[list[str | int]]:
    """The files of a folder with their sizes and the times of their last change."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
