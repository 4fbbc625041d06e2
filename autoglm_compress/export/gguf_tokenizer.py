"""A tokenizer of `transformers` as llama.cpp reads it: tokens, their kinds, merges, special ids, the chat template.

llama.cpp has two kinds that text models use: byte-level BPE (`gpt2`), which splits text by a regular expression that it
knows by name (`tokenizer.ggml.pre`, llama-vocab.cpp), and SentencePiece's BPE (`llama`), which merges the pair whose
token has the highest score. It normalises nothing.
"""

import json
from dataclasses import dataclass
from typing import Any

from autoglm_compress.errors import UserError

GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
DIGITS = "\\p{N}"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER_NUMBERS = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
LETTERS = "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
SPLITS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (f"{CONTRACTIONS}{LETTERS}\\p{{N}}{AFTER_NUMBERS}",): "qwen2",
    (f"{CONTRACTIONS}{LETTERS}\\p{{N}}{{1,3}}{AFTER_NUMBERS}",): "glm4",
}
"""llama.cpp's names for how text is split before merging, by the expressions that do it one after the other."""
WHOLE_TOKENS_FIRST = {"glm4": "llama-bpe"}
"""The name with the same expression where a word that is a token is not merged (`ignore_merges`)."""
SPACE = "▁"
FALLBACK_SCORE = -1e6
"""Of tokens that no merge makes."""


@dataclass(frozen=True)
class EngineTokenizer:
    """What a GGUF file says of a tokenizer.

    `kinds` are ggml's token types. `prefix` and `suffix` are the ids that `transformers` puts around a text unasked.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    prefix: list[int]
    suffix: list[int]
    space_prefix: bool | None
    chat_template: str | None

    @property
    def adds_bos(self) -> bool:
        """Whether a text begins with the beginning-of-text token."""
        return self.prefix[:1] == [self.special.get("bos")] and len(self.prefix) == 1

    @property
    def adds_eos(self) -> bool:
        """Whether a text ends with the end-of-text token."""
        return self.suffix[:1] == [self.special.get("eos")] and len(self.suffix) == 1


def engine_tokenizer(tokenizer: Any, vocab_size: int, where: str) -> EngineTokenizer:
    """What llama.cpp is to be told of a tokenizer.

    Args:
        tokenizer: of `transformers`.
        vocab_size: rows of the embedding; ids that the tokenizer does not have become tokens that are never used.
        where: the folder, for messages.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{where}: the tokenizer has no tokenizer.json, which the export to GGUF reads. Save a fast one."
        )
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"{where}: a {model['type']} tokenizer: the export to GGUF knows BPE, of bytes or SentencePiece's."
        )
    vocabulary = tokenizer.get_vocab()
    if (needed := max(vocabulary.values()) + 1) > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {needed - 1}, and vocab_size is {vocab_size}: llama.cpp takes no "
            "token without a row of the embedding. Remove the added tokens that the model does not know."
        )
    splits = _splits(described["pre_tokenizer"])
    common: dict[str, Any] = {
        "special": _special_ids(tokenizer, vocab_size),
        **_added_around(tokenizer),
        "chat_template": _chat_template(tokenizer),
        "tokens": _token_texts(vocabulary, vocab_size),
    }
    if splits is None:
        if not model.get("byte_fallback"):
            raise UserError(
                f"{where}: a BPE of characters without bytes for the rest: llama.cpp has no such tokenizer."
            )
        return EngineTokenizer(
            model="llama",
            pre="default",
            kinds=_kinds(tokenizer, described, vocab_size, bytes_as_tokens=True),
            scores=_scores(vocabulary, model["merges"], vocab_size),
            merges=None,
            space_prefix=_puts_space_first(described),
            **common,
        )
    pre = SPLITS.get(splits)
    if pre is None:
        shown = " then ".join(map(repr, splits)) or "nothing"
        raise UserError(
            f"{where}: the tokenizer splits text by {shown}, for which no name of llama.cpp is known here: "
            f"those are {', '.join(SPLITS.values())}."
        )
    return EngineTokenizer(
        model="gpt2",
        pre=WHOLE_TOKENS_FIRST.get(pre, pre) if model.get("ignore_merges") else pre,
        kinds=_kinds(tokenizer, described, vocab_size, bytes_as_tokens=False),
        scores=None,
        merges=[" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
        space_prefix=None,
        **common,
    )


def add_tokenizer(writer: Any, tokenizer: EngineTokenizer) -> None:
    """Add a tokenizer to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    for name, number in tokenizer.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(tokenizer.adds_eos)
    if tokenizer.space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.space_prefix)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _splits(described: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions that a byte-level pre-tokenizer splits by, in order; None for one that is not byte-level."""
    if described is None:
        return None
    parts = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    found = []
    byte_level = False
    for part in parts:
        if part["type"] == "Split":
            pattern = part["pattern"]
            found.append(pattern.get("Regex") or pattern.get("String"))
        elif part["type"] == "Digits":
            found.append(DIGITS if part["individual_digits"] else f"{DIGITS}+")
        elif part["type"] == "ByteLevel":
            byte_level = True
            found += [GPT2] if part.get("use_regex", True) else []
    return tuple(found) if byte_level else None


def _token_texts(vocabulary: dict[str, int], vocab_size: int) -> list[str]:
    by_id = {number: text for text, number in vocabulary.items()}
    return [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]


def _kinds(tokenizer: Any, described: dict[str, Any], vocab_size: int, *, bytes_as_tokens: bool) -> list[int]:
    """ggml's type of each token: special ones are found in text where that is asked for, added ones always."""
    from gguf import TokenType

    kinds = [TokenType.UNUSED] * vocab_size
    for number in described["model"]["vocab"].values():
        kinds[number] = TokenType.NORMAL
    if bytes_as_tokens:
        for byte in range(256):
            number = described["model"]["vocab"].get(f"<0x{byte:02X}>")
            if number is not None:
                kinds[number] = TokenType.BYTE
    for number, token in tokenizer.added_tokens_decoder.items():
        kinds[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    unknown = described["model"].get("unk_token")
    if bytes_as_tokens and unknown is not None:
        kinds[described["model"]["vocab"][unknown]] = TokenType.UNKNOWN
    return [int(kind) for kind in kinds]


def _scores(vocabulary: dict[str, int], merges: list[Any], vocab_size: int) -> list[float]:
    """A score for each token, higher for those that are merged first."""
    scores = [FALLBACK_SCORE] * vocab_size
    for rank, pair in enumerate(merges):
        made = vocabulary.get("".join(pair if isinstance(pair, list) else pair.split(" ", 1)))
        if made is not None and scores[made] == FALLBACK_SCORE:
            scores[made] = -float(rank)
    return scores


def _puts_space_first(described: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    normalizer, splitter = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" and step.get("prepend") == SPACE for step in steps)
    return prepends or splitter.get("prepend_scheme") in ("first", "always")


def _special_ids(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """The ids of special tokens by the names that GGUF has for them."""
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    return {name: number for name, number in found.items() if number is not None and number < vocab_size}


def _added_around(tokenizer: Any) -> dict[str, list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return {"prefix": whole[:start], "suffix": whole[start + len(plain) :]}


def _chat_template(tokenizer: Any) -> str | None:
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found
