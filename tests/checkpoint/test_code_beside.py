"""Code beside a model of a supported architecture: what is written refers to nothing that it lacks."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.running import compress

torch.set_num_threads(1)


def test_an_auto_map_is_dropped_with_the_code_it_names(make_checkpoint: Callable[..., Path], tmp_path: Path):
    source = copytree(make_checkpoint("llama"), tmp_path / "source")
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(data | {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}))
    plain = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix == ".json"}
    folder = compress(tmp_path / "run", source, {"stage": "depth", "layers": [0, 1]})
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text())
    assert (folder / "tokenizer.json").read_bytes() == plain["tokenizer.json"]
    assert AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a").input_ids
