"""`genai_config.json`, which tells onnxruntime-genai of a model."""

import json
from pathlib import Path
from typing import Any

from autoglm_compress.checkpoint import Checkpoint


def runtime_settings(file: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that the builder wrote, without the token that it makes up for models that begin with none."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if checkpoint.model_config.bos_token_id is None and checkpoint.tokenizer().bos_token_id is None:
        settings["model"]["bos_token_id"] = settings["model"]["pad_token_id"]
    return settings
