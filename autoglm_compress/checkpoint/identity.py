"""The identity of a checkpoint: the hashes of its files."""

from collections.abc import Mapping
from typing import Any

from autoglm_compress.checkpoint.reader import Checkpoint
from autoglm_compress.hashing import key_of, sha256


def hash_source(source: Checkpoint, known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size, modification time and SHA-256 of the source's files, by their paths in its folder.

    Unchanged files in `known` are not read again.
    """
    files = {}
    for path in [source.folder / "config.json", *source.tokenizer_files(), *source.files()]:
        state, name = path.stat(), path.relative_to(source.folder).as_posix()
        seen = known.get(name, {})
        same = (seen.get("bytes"), seen.get("mtime_ns")) == (state.st_size, state.st_mtime_ns)
        digest = seen["sha256"] if same else sha256(path)
        files[name] = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest}
    return files


def key_of_files(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The key of a checkpoint, from what `hash_source` found."""
    return key_of({name: file["sha256"] for name, file in files.items()})
