"""How long a text is, for engines that do not ask."""

from collections.abc import Iterable
from pathlib import Path

from autoglm_compress.serving.problems import RefusedError


class Lengths:
    """The tokenizer of a checkpoint, which counts tokens; without a `tokenizer.json`, nothing is counted.

    Args:
        folder: the checkpoint.
        most: tokens of a text with its answer.
    """

    def __init__(self, folder: Path, most: int) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
        self._most = most

    def room(self, texts: Iterable[str]) -> int:
        """How many tokens an answer to these texts may have. What a chat template adds is not counted.

        Raises:
            RefusedError: none.
        """
        if self._tokenizer is None:
            return self._most
        count = sum(len(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        if count >= self._most:
            message = f"the text has {count} tokens or more; with its answer it may have {self._most}."
            raise RefusedError(400, message)
        return self._most - count
