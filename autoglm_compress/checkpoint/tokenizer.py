"""The files besides config and weights: tokenizer, chat templates, processor files, generation settings."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autoglm_compress.errors import UserError, in_one_line

SENTENCEPIECE_MODEL = "tokenizer.model"
VOCABULARIES = ("tokenizer.json", SENTENCEPIECE_MODEL, "vocab.json", "vocab.txt", "tekken.json")
SENTENCEPIECE = ("sentencepiece", "google.protobuf")
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

KINDS = (
    "added_tokens",
    "additional_chat_templates",
    "audio_preprocessor",
    "audio_processor",
    "audio_tokenizer",
    "chat_template",
    "feature_extractor",
    "generation_config",
    "image_processor",
    "merges",
    "normalizer",
    "preprocessor_config",
    "processor_config",
    "sentencepiece",
    "special_tokens",
    "spiece",
    "tekken",
    "tokenizer",
    "video_preprocessor",
    "vocab",
)
"""Prefixes of the names of such files, or of their folders."""
ENDINGS = (".jinja", ".model", ".spm", ".tiktoken")


def sidecars(folder: Path) -> list[Path]:
    """The model's files besides config and weights, including those in subfolders.

    Hidden files are left out.
    """
    found: list[Path] = []
    for path in folder.iterdir():
        if path.name.startswith(KINDS) or path.name.endswith(ENDINGS):
            found += path.rglob("*") if path.is_dir() else [path]
    return sorted(path for path in found if path.is_file() and "/." not in path.relative_to(folder).as_posix())


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's vocabulary is there."""
    return any((folder / name).exists() for name in VOCABULARIES)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; remote code is never run.

    Raises:
        UserError: there is none, or `transformers` cannot read it.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: no tokenizer: expected one of {', '.join(VOCABULARIES)}. "
            "Copy the tokenizer files of the model into the folder."
        )
    if _needs_sentencepiece(folder) and not all(map(_is_installed, SENTENCEPIECE)):
        raise UserError(
            f"{folder}: the tokenizer is in tokenizer.model alone, a SentencePiece file, which transformers reads with "
            "two more packages: pip install sentencepiece protobuf."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; the user needs one sentence
        raise UserError(
            f"{folder}: transformers cannot read the tokenizer: {in_one_line(error)}. "
            "Install what it asks for, or copy its files again."
        ) from None


def _needs_sentencepiece(folder: Path) -> bool:
    """Whether the vocabulary is in a SentencePiece file alone; some files of that name are lists for tiktoken."""
    if [name for name in VOCABULARIES if (folder / name).exists()] != [SENTENCEPIECE_MODEL]:
        return False
    with (folder / SENTENCEPIECE_MODEL).open("rb") as file:
        return TIKTOKEN_LINE.fullmatch(file.readline(1000)) is None


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
