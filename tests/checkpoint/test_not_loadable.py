"""A source that plain transformers does not load or run is refused: what is made from it would be no better."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from support.command_line import assert_says, refusal
from support.running import write_recipe

MakeCheckpoint = Callable[..., Path]
LISTED = {"stage": "depth", "layers": [0, 1]}
HALF_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
CHOSEN = {"stage": "depth", "num_hidden_layers": 2}


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config."""
    copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"pad_token_id": 512}, "Padding_idx"), ({"hidden_act": "newest_activation"}, "newest_activation")],
    ids=["pad_token_id", "hidden_act"],
)
def test_what_transformers_does_not_build_is_refused(
    changes: dict[str, Any], word: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    whole = make_checkpoint("llama")
    source = edited(whole, tmp_path / "source", **changes)
    words = (f"{source}: transformers cannot load it", word, "Correct config.json")
    output = tmp_path / "out.json"
    assert_says(refusal("run", write_recipe(tmp_path, source, [LISTED]), "--output", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()
    assert_says(refusal("evaluate", source, "--tasks", "perplexity", "--output", output), *words)
    against = refusal("evaluate", whole, "--tasks", "perplexity", "--output", output, "--against", source)
    assert_says(against, *words)
    teacher = {"stage": "heal", "tokens": 1024, "batch_size": 4, "teacher": str(source)}
    assert_says(refusal("run", write_recipe(tmp_path, whole, [teacher]), "--output", tmp_path / "out"), *words)


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("llama", {"rope_parameters": HALF_LINEAR}, "size of tensor"),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4}, "sliding"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "KeyError: 'chunked_attention'"),
    ],
)
def test_what_transformers_does_not_run_is_refused_at_the_first_layer(
    family: str, changes: dict[str, Any], word: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    source = edited(make_checkpoint(family), tmp_path / "source", **changes)
    words = (f"{source}: transformers cannot run layer", word, "Check what config.json says", "sliding windows")
    recipe = write_recipe(tmp_path, source, [CHOSEN])
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), *words)
    output = tmp_path / "out.json"
    assert_says(refusal("evaluate", source, "--tasks", "perplexity", "--output", output), *words)
