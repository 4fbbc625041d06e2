"""Uploading to the Hugging Face hub."""

from pathlib import Path

from autoglm_compress.api.arguments import Place, named_family_in
from autoglm_compress.checked import checked
from autoglm_compress.publishing.push import push_folder
from autoglm_compress.records.push import PushResult


@checked
def push(
    folder: Place, repo: str, *, upload: bool = False, private: bool = False, family: Place | None = None
) -> PushResult:
    """Say what of a checkpoint or an export would be on the hub, and upload it if that is asked for.

    A checkpoint without a card gets one, from the records of its run.

    Args:
        folder: a checkpoint, an export, or a stage of a run, such as `runs/demo/int4`.
        repo: OWNER/NAME on the hub; it is made if it is not there.
        upload: whether to upload.
        private: whether nobody else may see the repo.
        family: a YAML file that describes the model's family, if the family is unknown.

    Raises:
        UserError: an argument is of a wrong type, the folder is not a whole checkpoint or export, or the hub refuses
            it.
    """
    return push_folder(Path(folder), repo, named_family_in(family), really=upload, private=private)
