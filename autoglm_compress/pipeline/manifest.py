"""`manifest.json`: the inputs and the results of a run."""

from datetime import datetime, timezone

import torch

from autoglm_compress.pipeline.preparation import Preparation
from autoglm_compress.records.files import STAGE, found
from autoglm_compress.records.manifest import Manifest, SourceRecord, StageEntry
from autoglm_compress.records.stage import StageRecord
from autoglm_compress.versions import package_versions


def write_manifest(preparation: Preparation) -> None:
    """Write it as things stand now."""
    inputs, keys = preparation.inputs, preparation.keys
    manifest = Manifest(
        recipe=inputs.recipe.as_data(),
        source=SourceRecord.model_validate(
            {"folder": str(inputs.source.folder), "key": keys.source, "files": keys.source_files}
        ),
        others={name: SourceRecord(**other) for name, other in keys.others.items()},
        calibration_key=keys.calibration,
        seed=inputs.recipe.seed,
        device=str(inputs.runtime.device),
        threads=torch.get_num_threads(),
        processes=inputs.runtime.processes.count,
        versions=package_versions(),
        written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        stages=[_entry(preparation, name, key) for name, key in zip(inputs.names, keys.stages, strict=True)],
    )
    inputs.folder.write_manifest(manifest)


def _entry(preparation: Preparation, name: str, key: str) -> StageEntry:
    record = found(StageRecord, preparation.inputs.folder.path / name / STAGE)
    if record is None or record.key != key:
        return StageEntry(name=name, key=key, finished=False)
    dropped = {"dropped": True} if record.dropped else {}
    return StageEntry(name=name, key=key, finished=True, files=record.files, **dropped)
