"""The result of `push` in Python."""

from pydantic import BaseModel, ConfigDict


class PushResult(BaseModel):
    """What was, or would be, on the hub.

    `repo` is OWNER/NAME, `url` its page, `files` the bytes of each file by name, `card` the text of the model card that
    was made for it; None if the folder has one. `uploaded` is False after a dry run.
    """

    model_config = ConfigDict(frozen=True)

    repo: str
    url: str
    private: bool
    files: dict[str, int]
    card: str | None
    uploaded: bool

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())
