"""What lies beside config and weights: every file of tokenizer and processors arrives, a missing package is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from autoglm_compress.checkpoint import tokenizer as tokenizer_files
from autoglm_compress.checkpoint.tokenizer import load_tokenizer, sidecars
from support.command_line import assert_says, refusal
from support.running import run, stage_folders, write_recipe

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]
STAGES = [
    {"stage": "depth", "num_hidden_layers": 2},
    {"stage": "quantize", "bits": 4, "group_size": 32, "method": "round_to_nearest", "max_divergence": 100},
]
DEFAULT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOL_USE = "{{ tools[0].function.name }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "open_settings", "parameters": {}}}]
MESSAGES = [{"role": "user", "content": "打开设置"}]
SIDECARS = {
    "additional_chat_templates/tool_use.jinja": TOOL_USE,
    "chat_template.jinja": DEFAULT,
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "qwen.tiktoken": "IQ== 0\n",
    "spiece.model": "",
    "vocab/parts/1.txt": "a",
}
OTHERS = {
    "README.md": "",
    "training_args.bin": "",
    "original/params.json": "{}",
    "tokenizer/.cache/lock": "",
    ".gitattributes": "",
    "quantize_config.json": "{}",
}


def with_files(model: Path, folder: Path, files: dict[str, str]) -> Path:
    """A copy of a model with more files."""
    shutil.copytree(model, folder)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_every_sidecar_is_in_every_checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    model = with_files(make_checkpoint("glm"), tmp_path / "model", SIDECARS | OTHERS)
    names = {path.relative_to(model).as_posix() for path in sidecars(model)}
    assert names == {*SIDECARS, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    recipe = write_recipe(tmp_path, model, STAGES)
    run(recipe)
    written = stage_folders(tmp_path / "out")
    assert len(written) == 2
    expected = AutoTokenizer.from_pretrained(model)
    for folder in written:
        assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in names)
        assert not any((folder / name).exists() for name in OTHERS)
        listed = json.loads((folder / "stage.json").read_text())["files"]
        assert names <= listed.keys()
        found = AutoTokenizer.from_pretrained(folder)
        for tools in (None, TOOLS):
            text = found.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
            assert text == expected.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
            assert text.startswith("open_settings" if tools else "<user>")
    assert "finished before, reused" in run(recipe)
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE + "\n")
    assert "changed: done again" in run(recipe)


def test_a_tokenizer_in_a_sentencepiece_file_alone_names_the_packages_that_it_needs(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02\x0a")
    monkeypatch.setattr(tokenizer_files, "_is_installed", lambda package: package != "google.protobuf")
    cure = "pip install sentencepiece protobuf"
    message = refusal("run", write_recipe(tmp_path, model, STAGES), "--output", tmp_path / "out")
    assert_says(message, model, "tokenizer.model", cure)
    arguments = ("--tasks", "perplexity", "--output", tmp_path / "out.json")
    assert_says(refusal("evaluate", model, *arguments), cure)
    (model / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # of tiktoken, which other packages read
    assert cure not in refusal("evaluate", model, *arguments)


def test_a_sentencepiece_file_is_read_as_transformers_reads_it(tmp_path: Path):
    pytest.importorskip("google.protobuf")
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Row {number} says {number * number} to all the others." for number in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    expected = AutoTokenizer.from_pretrained(tmp_path)("Row 3 says 9")["input_ids"]
    assert load_tokenizer(tmp_path)("Row 3 says 9")["input_ids"] == expected
