"""Whether llama.cpp reads text as `transformers` does: texts in many scripts, and special tokens."""

import tempfile
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.errors import UserError
from autoglm_compress.export import llama_cpp
from autoglm_compress.export.engine_process import EngineError, ask_engine
from autoglm_compress.export.gguf_tokenizer import EngineTokenizer
from autoglm_compress.export.gguf_writer import write_vocabulary
from autoglm_compress.export.id_comparison import compare_with


def require_same_ids(shape: ModelShape, config: Any, tokenizer: Any, told: EngineTokenizer, where: str) -> None:
    """Raise UserError if llama.cpp gives other ids than a tokenizer of `transformers`.

    Args:
        shape: the model's.
        config: the text tower's `transformers` config.
        tokenizer: of `transformers`.
        told: what llama.cpp is told of it.
        where: the model's folder, for messages.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        write_vocabulary(shape, config, told, file)
        try:
            compared = compare_with(
                tokenizer, lambda texts: ask_engine(llama_cpp.__name__, {"file": str(file), "texts": texts})
            )
        except EngineError as error:
            raise UserError(f"{where}: llama.cpp does not take the tokenizer: {error}.") from None
    if wrong := compared.differing():
        raise UserError(
            f"{where}: llama.cpp's tokenizer {told.model!r} with pre {told.pre!r} gives other ids for {len(wrong)} of "
            f"{len(compared.texts)} texts, such as {compared.example(wrong[0])}. "
            "The model would read nonsense: it cannot be exported to GGUF with this tokenizer."
        )
