"""A model checkpoint as a folder of safetensors: where it comes from, reading it lazily, writing it atomically."""

from autoglm_compress.checkpoint.reader import Checkpoint
from autoglm_compress.checkpoint.source import config_only, resolve_source
from autoglm_compress.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "config_only", "resolve_source"]
