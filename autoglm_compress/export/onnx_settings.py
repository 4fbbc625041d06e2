"""`genai_config.json`, which tells onnxruntime-genai of a model."""

import json
from pathlib import Path
from typing import Any

from autoglm_compress.checkpoint import Checkpoint

LONGEST_BY_DEFAULT = 4096
"""Tokens of a text if nothing else is asked for: the engine takes memory for all of them when it begins."""


def runtime_settings(file: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that the builder wrote, but for what it makes up.

    It has a first token for models that begin with none, and takes memory for the longest text that can be.
    """
    settings = json.loads(file.read_text(encoding="utf-8"))
    if checkpoint.model_config.bos_token_id is None and checkpoint.tokenizer().bos_token_id is None:
        settings["model"]["bos_token_id"] = settings["model"]["pad_token_id"]
    settings["search"]["max_length"] = min(settings["search"]["max_length"], LONGEST_BY_DEFAULT)
    return settings
