"""Width of models with towers: what the towers write is cut as the stream is, and neurons within them are left out."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from autoglm_compress.architecture import Family
from autoglm_compress.architecture.family import INNER
from autoglm_compress.architecture.family_files import built_in
from support.command_line import assert_says, plan, refusal
from support.multimodal import FAMILIES, load, logits, media_rows, save, text_row
from support.running import compress, run, tensors_of, write_recipe

torch.set_num_threads(1)
ALIVE = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:32].sort().values
DEAD = torch.ones(64, dtype=torch.bool).index_fill(0, ALIVE, False)
ALIVE_HEADS = [1, 2]
"""One of each KV group of two."""


def in_fp32(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint in fp32 with tensors changed in place, and norms that add next to nothing."""
    copytree(source, folder, ignore=lambda *_: ["model.safetensors"])
    tensors = {name: tensor.float() for name, tensor in tensors_of(source).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text().replace("bfloat16", "float32"))
    config["text_config"]["rms_norm_eps"] = 1e-12
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def silence(family: Family, tensors: dict[str, torch.Tensor]) -> None:
    """Leave nothing in dead channels, heads and neurons; a LayerNorm sees each live channel twice instead."""
    for name, tensor in tensors.items():
        axes = family.bridge(name) or ()
        if name == family.embedding or (axes[-1:] == ("hidden",) and len(axes) == 2):
            tensor[:, DEAD] = 0
        elif axes[:1] == ("hidden",) or (".layers." in name and ("o_proj" in name or "down_proj" in name)):
            if not axes and name.startswith(tuple(family.kept.values())):
                continue
            tensor[DEAD] = 0
        if name.endswith("self_attn.o_proj.weight") and family.transformers_derives_head_dim and not axes:
            tensor.view(64, 4, 16)[:, [0, 3]] = 0
        if axes[1:2] == (INNER,) and axes[0] != INNER:
            tensor.view(len(tensor), 64, -1)[:, DEAD] = 0
    if family.folded:
        tensors[f"{family.folded[1]}.weight"][DEAD] = tensors[f"{family.folded[1]}.weight"][ALIVE]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["activation", None])
def test_dead_channels_and_neurons_go_first_and_are_not_missed(
    name: str, method: str | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    family = built_in()[FAMILIES[name].architecture]
    source = in_fp32(
        save(name, tmp_path / "bf16", tokenizer), tmp_path / "source", lambda tensors: silence(family, tensors)
    )
    heads = {"num_attention_heads": 2} if family.transformers_derives_head_dim else {}
    result = compress(tmp_path, source, {"stage": "width", "hidden_size": 32, "method": method} | heads)
    before, after = load(source), load(result)
    worst = max(
        float((logits(after, row) - logits(before, row)).abs().max()) for row in (text_row(), *media_rows(name))
    )
    print(name, method, worst)
    assert worst < (1e-5 if method else 1e-3)


@pytest.mark.parametrize("name", ["glm4v", "glm46v"])
def test_the_vision_tower_of_glm4v_is_that_of_the_source_without_the_neurons(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = in_fp32(save(name, tmp_path / "bf16", tokenizer), tmp_path / "source", lambda tensors: None)
    cut = {"stage": "width", "hidden_size": 32, "num_attention_heads": 2}
    result = compress(tmp_path, source, cut)
    decisions = json.loads((result / "stage.json").read_text())["decisions"]
    neurons, channels = decisions["kept_tower_neurons"], decisions["kept_channels"]
    before, after = load(source), load(result)
    _without_neurons(before.model.visual, neurons, channels)
    [row] = media_rows(name)
    seen = {"pixel_values": row["pixel_values"], "image_grid_thw": row["image_grid_thw"]}
    with torch.no_grad():
        expected, found = (torch.cat(model.get_image_features(**seen).pooler_output) for model in (before, after))
    assert expected.shape == (4, 32)
    assert ((found - expected).norm() / expected.norm()) < 2e-6


def _without_neurons(visual: nn.Module, neurons: dict[str, list[int]], channels: list[int]) -> None:
    """The same surgery in memory, spelled out: unfolded linears, and slices of the weights where they are used."""
    functional = nn.functional
    for number, block in enumerate(visual.blocks):
        kept, mlp = neurons[f"model.visual.blocks.{number}.mlp"], block.mlp

        def without(states: torch.Tensor, kept: list[int] = kept, mlp: nn.Module = mlp) -> torch.Tensor:
            gate = functional.silu(states @ mlp.gate_proj.weight[kept].T)
            return (gate * (states @ mlp.up_proj.weight[kept].T)) @ mlp.down_proj.weight[:, kept].T

        mlp.forward = without
    kept, merger = neurons["model.visual.merger"], visual.merger

    def merge(states: torch.Tensor) -> torch.Tensor:
        norm = merger.post_projection_norm
        states = merger.proj(states)[:, kept]
        states = functional.layer_norm(states, (len(kept),), norm.weight[kept], norm.bias[kept], norm.eps)
        states = functional.gelu(states)
        gate = functional.silu(states @ merger.gate_proj.weight[:, kept].T)
        return ((gate * (states @ merger.up_proj.weight[:, kept].T)) @ merger.down_proj.weight.T)[:, channels]

    merger.forward = merge


def test_heads_alone_and_width_alone_are_refused_where_head_dim_hangs_on_both(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = save("glm4v", tmp_path / "source", tokenizer)
    for stage in ({"stage": "heads", "num_attention_heads": 2}, {"stage": "width", "hidden_size": 32}):
        message = refusal("plan", write_recipe(tmp_path, source, [stage]))
        assert_says(message, "head_dim", "the stage width cuts both at once, with hidden_size and num_attention_heads")
    both = {"stage": "width", "hidden_size": 32, "num_attention_heads": 2}
    shape = plan(write_recipe(tmp_path, source, [both]))["checkpoints"][-1]["shape"]
    assert (shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]) == (32, 2, 16)
    message = refusal("plan", write_recipe(tmp_path, source, [both | {"num_attention_heads": 3}]))
    assert_says(message, "stages.1.num_attention_heads", "expected one of [2, 4]")


def test_layers_after_which_images_come_in_again_stay(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    source = save("qwen3vl", tmp_path / "source", tokenizer)
    message = refusal("plan", write_recipe(tmp_path, source, [{"stage": "depth", "layers": [1, 2, 3]}]))
    assert_says(message, "stages.1.layers", "after each of the first 1 layers")
    for method in ("chain", "block_influence", "angular", "greedy_loss", "random"):
        recipe = write_recipe(tmp_path / method, source, [{"stage": "depth", "num_hidden_layers": 1, "method": method}])
        run(recipe)
        record = json.loads((recipe.parent / "out/01-depth/stage.json").read_text())
        assert record["decisions"]["kept_layers"] == [0]
