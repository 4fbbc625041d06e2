"""`push`: a checkpoint or an export, with its card, to the hub."""

from pathlib import Path

from autoglm_compress.architecture import Family
from autoglm_compress.publishing.content import content_of
from autoglm_compress.publishing.hub import page_of, require_repo_id, upload
from autoglm_compress.records.folders import find_folder
from autoglm_compress.records.push import PushResult


def push_folder(given: Path, repo: str, family: Family | None, *, really: bool, private: bool) -> PushResult:
    """Say what would be uploaded, and upload it if `really` is True.

    Args:
        given: a checkpoint, an export, or a run and the label of a stage.
        repo: OWNER/NAME.
        family: describes the checkpoint, if its family is not a known one.
        really: whether to upload.
        private: whether nobody else may see the repo.

    Raises:
        UserError: the folder or the repo cannot be what is meant, or the hub refuses it.
    """
    require_repo_id(repo)
    folder = find_folder(given)
    content = content_of(folder, repo, family)
    if really:
        upload(content, repo, f"Upload {folder.name}", private=private)
    return PushResult(
        repo=repo, url=page_of(repo), private=private, files=content.sizes(), card=content.card, uploaded=really
    )
