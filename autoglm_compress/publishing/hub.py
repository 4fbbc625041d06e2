"""Uploading to the Hugging Face hub, by its own client."""

import tempfile
from pathlib import Path

from autoglm_compress.checkpoint.source import CARD
from autoglm_compress.checkpoint.weight_files import INDEX
from autoglm_compress.errors import UserError, listed
from autoglm_compress.publishing.content import Content

REMEDIES = {
    401: "The token is not valid: log in with `hf auth login`, or set HF_TOKEN.",
    403: "The token may not write there: make one with the role write, or give a repo of your own.",
}
"""What to do about an answer of the hub, by its HTTP status."""


def require_repo_id(repo: str) -> None:
    """Raise UserError if this is not OWNER/NAME as the hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        reason = "" if repo.count("/") == 1 else "the owner is missing"
    except HFValidationError as error:
        reason = str(error).splitlines()[0].rstrip(".")
    if reason:
        raise UserError(f"{repo}: not a repo on the hub: {reason}. Give OWNER/NAME, such as me/my-model-int4.")


def page_of(repo: str) -> str:
    """The address of a repo."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def upload(content: Content, repo: str, message: str, *, private: bool) -> None:
    """Make the repo if it is not there, and upload the files in one commit, or a few if there are many.

    All that the hub refuses is asked of it before weights are read.

    Args:
        content: what to upload.
        repo: OWNER/NAME.
        message: of the commit.
        private: whether nobody else may see the repo.

    Raises:
        UserError: there is no token, or the hub refuses it or is not reached.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("no token for the hub: log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.model_info(repo)
    except Exception as error:  # the client raises many kinds; the user needs one sentence
        raise _refused(repo, error) from None
    if private and not there.private:
        raise UserError(f"{repo}: is there already, and everybody can see it. Make it private on {page_of(repo)}.")
    _require_no_other_weights(content, repo, [file.rfilename for file in there.siblings or ()])
    with tempfile.TemporaryDirectory() as staged:
        _stage(content, Path(staged))
        try:
            api.upload_folder(repo_id=repo, folder_path=staged, commit_message=message)
        except Exception as error:
            raise _refused(repo, error) from None


def _require_no_other_weights(content: Content, repo: str, there: list[str]) -> None:
    """Raise UserError if `transformers` could load other weights than these, which an earlier upload left there."""
    weights = [name for name in there if name.endswith(".safetensors") or name == INDEX]
    left = [name for name in weights if name not in content.files]
    if left and any(name.endswith(".safetensors") for name in content.files):
        raise UserError(
            f"{repo}: has other weights, which transformers might load: {listed(left)}. Delete them on "
            f"{page_of(repo)}, or give another repo."
        )


def _stage(content: Content, folder: Path) -> None:
    """A folder with links to the files and with the card: the client uploads folders."""
    for name, path in content.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    if content.card is not None:
        (folder / CARD).write_text(content.card, encoding="utf-8")


def _refused(repo: str, error: Exception) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = REMEDIES.get(status) if status else f"Is {page_of(repo)} reached from here? Give the same command again."
    return UserError(f"{repo}: the hub did not take it: {reason.rstrip('.')}. {remedy or ''}".rstrip())
