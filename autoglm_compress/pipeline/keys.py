"""Hashes of everything that a stage's result depends on. The same key means the same bytes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_compress.architecture.family_files import built_in
from autoglm_compress.calibration.text import text_key
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.identity import hash_source, key_of_files
from autoglm_compress.forward.statistics import REVISION as STATISTICS_REVISION
from autoglm_compress.hashing import key_of
from autoglm_compress.pipeline.inputs import RunInputs
from autoglm_compress.recipe import Recipe
from autoglm_compress.records.manifest import SourceRecord

REVISION = 2
"""Raise it when results change for a reason that no stage's own revision covers."""


@dataclass(frozen=True)
class KnownCheckpoint:
    """A checkpoint of a run: its name, its key and its folder."""

    name: str
    key: str
    folder: Path


@dataclass(frozen=True)
class Keys:
    """The keys of the source and of every stage, and the files that they were made from.

    `source_files` and the `files` of `others` (checkpoints that stages name, each with its `folder`) have sizes and
    hashes; `calibration` is the key of the calibration text.
    """

    source: str
    stages: tuple[str, ...]
    calibration: str
    source_files: dict[str, dict[str, Any]]
    others: dict[str, dict[str, Any]]


def calibration_key(
    options: CalibrationOptions, files: Mapping[str, Path | None], divided_sources: Collection[str]
) -> str:
    """The key of the calibration tokens (of one tokenizer), whose sources are read from `files`.

    `divided_sources` are the sources with documents set apart to decide about fits.
    """
    parts = [[rows, text_key(files[source]), source in divided_sources] for source, rows in options.rows.items()]
    text = parts if len(parts) > 1 else parts[0][1:]
    return key_of([options.samples, options.sequence_length, options.seed, text])


def stage_keys(
    recipe: Recipe,
    source_files: dict[str, dict[str, Any]],
    calibration: str,
    others: Mapping[str, str],
    settings_key: Callable[[str], str],
    family: str | None = None,
) -> tuple[str, list[str]]:
    """The key of the source, and that of every stage: its options and all that its result depends on.

    `others` are the keys of the checkpoints that stages name, and `settings_key` gives that of a task's settings.
    `family` is the hash of the file that the recipe gives for the source's family, if it does.
    """
    source_key = key_of_files(source_files)
    if family is not None:
        source_key = key_of([source_key, family])
    keys: list[str] = []
    for stage, parent in zip(recipe.stages, recipe.parents, strict=True):
        options = stage.model_dump(mode="json", exclude={"name", "source", *stage.accepting})
        depends = [REVISION, stage.revision, options, recipe.seed, source_key if parent is None else keys[parent]]
        if stage.uses_calibration:
            depends += [source_key, calibration, STATISTICS_REVISION]
        if stage.trains_on_calibration:
            # Of more rows than calibration has, shares give others.
            depends.append(recipe.calibration.model_dump(mode="json")["source"])
        depends += [others.get(name) for name in stage.other_checkpoints.values()]
        depends += [settings_key(task) for task in stage.evaluates]
        keys.append(key_of(depends))
    return source_key, keys


def keys_of(inputs: RunInputs) -> Keys:
    """Hash everything a run depends on. Unchanged files that the manifest knows are not read again."""
    recipe, manifest = inputs.recipe, inputs.folder.manifest
    source_files = _hashed(inputs.source, manifest.source)
    others: dict[str, dict[str, Any]] = {}
    for stage in recipe.stages[: inputs.chosen[-1] + 1]:
        for option, name in stage.other_checkpoints.items():
            other = inputs.open_other(name, option)
            others[name] = {"folder": str(other.folder), "files": _hashed(other, manifest.others.get(name))}
    reads_text = any(stage.uses_calibration for stage in recipe.stages)
    divided_sources = inputs.text.divided_sources if reads_text else ()
    calibration = calibration_key(recipe.calibration, inputs.text.files, divided_sources)
    by_name = {name: key_of_files(other["files"]) for name, other in others.items()}
    used = inputs.source.family
    family = None if built_in().get(used.architecture) is used else key_of(used.model_dump(mode="json"))
    source, stages = stage_keys(recipe, source_files, calibration, by_name, inputs.evaluations.settings_key, family)
    return Keys(source, tuple(stages), calibration, source_files, others)


def _hashed(checkpoint: Checkpoint, known: SourceRecord | None) -> dict[str, dict[str, Any]]:
    """The hashes of a checkpoint's files by `hash_source`, reusing those in the manifest for unchanged files."""
    if known is None or known.folder != str(checkpoint.folder):
        return hash_source(checkpoint, {})
    return hash_source(checkpoint, {name: file.as_data() for name, file in known.files.items()})
