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
from autoglm_compress.export.sample_texts import sample_texts

MOST_SPECIAL = 50
"""Of the special tokens, so many are read between words."""


def require_same_ids(shape: ModelShape, config: Any, tokenizer: Any, told: EngineTokenizer, where: str) -> int:
    """Raise UserError if llama.cpp gives other ids than a tokenizer of `transformers`; the number of texts compared.

    Args:
        shape: the model's.
        config: the text tower's `transformers` config.
        tokenizer: of `transformers`.
        told: what llama.cpp is told of it.
        where: the model's folder, for messages.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:MOST_SPECIAL]
    texts = sample_texts() + [f"before{token}after" for token in special]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        write_vocabulary(shape, config, told, file)
        try:
            found = ask_engine(llama_cpp.__name__, {"file": str(file), "texts": texts})
        except EngineError as error:
            raise UserError(f"{where}: llama.cpp does not take the tokenizer: {error}.") from None
    expected = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    wrong = [text for text, ours, theirs in zip(texts, expected, found, strict=True) if ours != theirs]
    if wrong:
        number = texts.index(wrong[0])
        raise UserError(
            f"{where}: llama.cpp's tokenizer {told.model!r} with pre {told.pre!r} gives other ids for {len(wrong)} of "
            f"{len(texts)} texts, such as {wrong[0][:40]!r}: {found[number][:12]} instead of {expected[number][:12]}. "
            "The model would read nonsense: it cannot be exported to GGUF with this tokenizer."
        )
    return len(texts)
