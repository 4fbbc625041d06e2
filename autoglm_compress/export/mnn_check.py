"""Whether MNN reads text as `transformers` does: texts in many scripts, special tokens, a chat."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any

from autoglm_compress.errors import UserError
from autoglm_compress.export import mnn_builder, mnn_engine
from autoglm_compress.export.chat_comparison import chat_problem
from autoglm_compress.export.engine_process import EngineError, ask_engine
from autoglm_compress.export.id_comparison import IdComparison, blanks_problem, compare_with, require_alike
from autoglm_compress.export.mnn_names import MODEL_SETTINGS, SETTINGS, TOKENIZER


def require_same_ids(tokenizer: Any, where: Path) -> None:
    """Raise UserError if MNN does not take a tokenizer, or gives other ids for more than blanks.

    Args:
        tokenizer: of `transformers`.
        where: the model's folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            ask_engine(mnn_builder.__name__, {"tokenizer": str(where), "output": folder})
            compared = _compared(tokenizer, folder)
        except EngineError as error:
            raise UserError(f"{where}: MNN does not take the tokenizer: {error}.") from None
    require_alike(tokenizer, compared, str(where), "MNN", "MNN")


def reading_problems(tokenizer: Any, written: Path) -> list[str]:
    """What MNN reads or writes otherwise than a tokenizer of `transformers`, and the model can bear.

    Args:
        tokenizer: of `transformers`.
        written: the folder of an export.
    """
    with _without_model(written) as folder:
        compared = _compared(tokenizer, folder)
        chat = chat_problem(
            tokenizer, "MNN", lambda chat: str(ask_engine(mnn_engine.__name__, {"folder": folder, "chat": chat}))
        )
    return [problem for problem in (blanks_problem(compared, "MNN"), chat) if problem]


def _compared(tokenizer: Any, folder: str) -> IdComparison:
    return compare_with(
        tokenizer,
        lambda texts: ask_engine(mnn_engine.__name__, {"folder": folder, "texts": texts}),
        adds_special=True,
    )


@contextmanager
def _without_model(written: Path) -> Iterator[str]:
    """A folder with the tokenizer of an export alone."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (TOKENIZER, SETTINGS, MODEL_SETTINGS):
            copyfile(written / name, Path(folder) / name)
        yield folder
