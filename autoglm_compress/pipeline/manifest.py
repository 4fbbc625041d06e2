"""`manifest.json`: what a run was made from and what it has made."""

from datetime import datetime, timezone

import torch

from autoglm_compress.pipeline.preparation import Preparation
from autoglm_compress.pipeline.run_folder import STAGE, read_json
from autoglm_compress.pipeline.versions import package_versions


def write_manifest(preparation: Preparation) -> None:
    """Write it as things stand now."""
    inputs, keys = preparation.inputs, preparation.keys
    stages = []
    for name, key in zip(inputs.names, keys.stages, strict=True):
        record = read_json(inputs.folder.path / name / STAGE) or {}
        finished = record.get("key") == key
        kept = {field: record[field] for field in ("files", "dropped") if finished and field in record}
        stages.append({"name": name, "key": key, "finished": finished} | kept)
    inputs.folder.write_manifest(
        {
            "recipe": inputs.recipe.as_data(),
            "source": {"folder": str(inputs.source.folder), "key": keys.source, "files": keys.source_files},
            "others": keys.others,
            "calibration_key": keys.calibration,
            "seed": inputs.recipe.seed,
            "device": str(inputs.runtime.device),
            "threads": torch.get_num_threads(),
            "processes": inputs.runtime.processes.count,
            "versions": package_versions(),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "stages": stages,
        }
    )
