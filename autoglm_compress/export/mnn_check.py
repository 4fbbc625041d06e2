"""Whether MNN reads text as `transformers` does: texts in many scripts, and special tokens."""

import tempfile
from pathlib import Path
from typing import Any

from autoglm_compress.errors import UserError
from autoglm_compress.export import mnn_builder, mnn_engine
from autoglm_compress.export.engine_process import EngineError, ask_engine
from autoglm_compress.export.sample_texts import sample_texts

MOST_SPECIAL = 50
"""Of the special tokens, so many are read between words."""


def require_same_ids(tokenizer: Any, where: Path) -> int:
    """Raise UserError if MNN gives other ids than a tokenizer of `transformers`; the number of texts compared.

    Args:
        tokenizer: of `transformers`.
        where: the model's folder.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:MOST_SPECIAL]
    texts = sample_texts() + [f"before{token}after" for token in special]
    with tempfile.TemporaryDirectory() as folder:
        try:
            ask_engine(mnn_builder.__name__, {"tokenizer": str(where), "output": folder})
            found = ask_engine(mnn_engine.__name__, {"folder": folder, "texts": texts})
        except EngineError as error:
            raise UserError(f"{where}: MNN does not take the tokenizer: {error}.") from None
    expected = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    wrong = [number for number, (ours, theirs) in enumerate(zip(expected, found, strict=True)) if ours != theirs]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{where}: MNN's tokenizer gives other ids for {len(wrong)} of {len(texts)} texts, such as "
            f"{texts[first][:40]!r}: {found[first][:12]} instead of {expected[first][:12]}. "
            "The model would read nonsense: it cannot be exported to MNN with this tokenizer."
        )
    return len(texts)
