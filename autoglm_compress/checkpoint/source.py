"""Finding a model: a local folder, or a Hugging Face hub id that is downloaded once."""

from pathlib import Path

from autoglm_compress.checkpoint.tokenizer import ENDINGS, KINDS
from autoglm_compress.errors import UserError

WEIGHTS_AND_SIDECARS = ["*.json", "*.safetensors", *(f"{kind}*" for kind in KINDS), *(f"*{end}" for end in ENDINGS)]
CARD = "README.md"
"""It names the license, which the cards of what is made from the model name too."""
DUPLICATES = ["consolidated*", "original/*"]


def local_folder(source: str, bases: list[Path]) -> Path | None:
    """The folder that a recipe's `model.source` names, looked up beside the recipe, then in the working directory."""
    for base in bases:
        folder = (base / Path(source).expanduser()).resolve()
        if folder.is_dir():
            return folder
    return None


def _looks_like_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~"))


def _require_hub_id(source: str, bases: list[Path], option: str) -> None:
    if not _looks_like_hub_id(source):
        looked = " or in ".join(str(base) for base in bases)
        raise UserError(f"{option}: no folder {source!r} in {looked}, and it is not a hub id (owner/name).")


def resolve_source(source: str, bases: list[Path], option: str = "model.source") -> Path:
    """The folder of a model that an option names, downloaded from the hub if it is not a local folder.

    Raises:
        UserError: there is no such folder, or the hub does not give the model.
    """
    folder = local_folder(source, bases)
    if folder is not None:
        return folder
    _require_hub_id(source, bases, option)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[*WEIGHTS_AND_SIDECARS, CARD], ignore_patterns=DUPLICATES))
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        raise _not_from_hub(source, bases, option, error) from None


def config_only(source: str, bases: list[Path], option: str = "model.source") -> Path:
    """A folder with at least the model's `config.json`. For a hub model, only that file is downloaded."""
    folder = local_folder(source, bases)
    if folder is not None:
        return folder
    _require_hub_id(source, bases, option)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "config.json")).parent
    except Exception as error:
        raise _not_from_hub(source, bases, option, error) from None


def _not_from_hub(source: str, bases: list[Path], option: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    looked = " or in ".join(str(base) for base in bases)
    return UserError(
        f"{option}: no folder {source!r} in {looked}, and the hub did not give {source!r}: {reason}\n"
        "Give a local folder, such as with --set model.source=PATH, or check the name and the network."
    )
