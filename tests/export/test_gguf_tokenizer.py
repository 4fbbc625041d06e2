"""Tokenizers as llama.cpp reads them: the same ids as transformers for texts in many scripts, or a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.export.gguf_format import GgufFormat
from autoglm_compress.export.gguf_tokenizer import SPLITS, engine_tokenizer
from autoglm_compress.export.sample_texts import sample_texts

Make = Callable[..., Path]
SIZE = 1024
BY_NAME = {name: expressions for expressions, name in SPLITS.items()}


def pre_tokenizer(expressions: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    """Splits by these expressions, then bytes as characters."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(splitter: pre_tokenizers.PreTokenizer, special: tuple[str, ...] = ("<|end|>",)) -> Tokenizer:
    """A byte-level BPE that has merges for many scripts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 10,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """What a converted SentencePiece BPE looks like: spaces as marks, bytes for what has no token."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = marks
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 266, special_tokens=specials, limit_alphabet=200, max_token_length=8, show_progress=False
    )
    trained.train_from_iterator(sample_texts()[:60], trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    rest = [piece for piece in sorted(model["vocab"], key=model["vocab"].__getitem__) if piece not in specials]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *rest])}
    merges = [tuple(pair) for pair in model["merges"]]
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = marks
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens(specials)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


@pytest.fixture
def folder(make_checkpoint: Make, tmp_path: Path) -> Path:
    """A model of SIZE tokens, for a test to give a tokenizer."""
    return copytree(make_checkpoint("glm", vocab_size=SIZE), tmp_path / "model")


def check(folder: Path, tokenizer: Tokenizer, **special: str) -> Path:
    """Save a tokenizer beside a model, and let the engine read texts with it."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    checkpoint = Checkpoint(folder)
    GgufFormat().check_model(checkpoint.shape, checkpoint.model_config, folder)
    return folder


@pytest.mark.parametrize("name", BY_NAME)
def test_every_known_way_to_split_gives_the_same_ids(name: str, folder: Path):
    check(folder, byte_level(pre_tokenizer(BY_NAME[name])), eos_token="<|end|>")
    assert engine_tokenizer(Checkpoint(folder).tokenizer(), SIZE, "").pre == name


def test_words_that_are_tokens_are_not_merged_where_the_tokenizer_says_so(folder: Path):
    tokenizer = byte_level(pre_tokenizer(BY_NAME["glm4"]))
    tokenizer.model.ignore_merges = True
    check(folder, tokenizer, eos_token="<|end|>")
    assert engine_tokenizer(Checkpoint(folder).tokenizer(), SIZE, "").pre == "llama-bpe"


def test_digits_by_their_own_splitter(folder: Path):
    splitter = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    check(folder, byte_level(pre_tokenizers.Sequence(splitter)), eos_token="<|end|>")


def test_sentencepiece_with_bytes_and_a_beginning(folder: Path):
    check(folder, sentencepiece(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    told = engine_tokenizer(Checkpoint(folder).tokenizer(), SIZE, "")
    assert (told.model, told.adds_bos, told.adds_eos, told.space_prefix) == ("llama", True, False, True)


def test_added_and_special_tokens_and_the_chat_template(folder: Path):
    tokenizer = byte_level(pre_tokenizer(BY_NAME["qwen2"]), ("<|end|>", "<|user|>", "<|assistant|>"))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    checkpoint = Checkpoint(folder)
    GgufFormat().check_model(checkpoint.shape, checkpoint.model_config, folder)
    told = engine_tokenizer(checkpoint.tokenizer(), SIZE, "")
    assert told.chat_template == fast.chat_template
    kinds = dict(zip(told.tokens, told.kinds, strict=True))
    assert (kinds["<|user|>"], kinds["<think>"], kinds[f"[PAD{SIZE - 1}]"]) == (3, 4, 5)


def test_a_way_to_split_that_the_engine_has_no_name_for_is_refused(folder: Path):
    with pytest.raises(UserError, match=r"splits text by '\\\\w\+', for which no name of llama\.cpp is known"):
        check(folder, byte_level(pre_tokenizer((r"\w+",))), eos_token="<|end|>")


def test_a_tokenizer_that_normalises_is_refused(folder: Path):
    """The engine would read upper case as it is."""
    tokenizer = byte_level(pre_tokenizer(BY_NAME["gpt-2"]))
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"gives other ids for \d+ of \d+ texts, such as"):
        check(folder, tokenizer, eos_token="<|end|>")


def test_tokens_without_an_embedding_are_refused(folder: Path):
    tokenizer = byte_level(pre_tokenizer(BY_NAME["gpt-2"]))
    tokenizer.add_tokens([f"<extra{number}>" for number in range(20)])
    with pytest.raises(UserError, match=rf"ids up to \d+, and vocab_size is {SIZE}"):
        check(folder, tokenizer, eos_token="<|end|>")


def test_other_kinds_are_refused(folder: Path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="a WordLevel tokenizer: the export to GGUF knows BPE"):
        check(folder, tokenizer)
