"""`plan` of the recipes for AutoGLM-Phone-9B: what the article promises, counted on a config of its shape."""

from pathlib import Path
from typing import Any

import pytest

from support.command_line import plan
from support.places import GLM4V, OMNI, RECIPES
from support.running import invoke

CONTEXT_TOKENS = 32_768


def planned(name: str) -> list[dict[str, Any]]:
    return plan(RECIPES / f"{name}.yaml", "--set", f"model.source={GLM4V}")["checkpoints"]


def test_the_source_is_10_3_billion_parameters_of_which_the_vision_tower_has_a_twelfth():
    source = planned("autoglm-phone-9b")[0]
    parts = source["parameters_by_part"]
    assert round(source["parameters"] / 1e9, 2) == 10.29
    assert sum(parts.values()) == source["parameters"]
    assert round((parts["attention"] + parts["ffn"] + parts["norms"]) / 1e9, 2) == 8.16
    assert round(parts["embedding"] / 1e9, 2) == round(parts["head"] / 1e9, 2) == 0.62
    assert round((parts["vision"] + parts["adapter"]) / 1e9, 2) == 0.89


@pytest.mark.parametrize(
    ("name", "parameters", "sizes"),
    [
        ("autoglm-phone-9b", 8.04, (32, 4096, 13696, 32)),
        ("autoglm-phone-4b", 3.95, (24, 3072, 10272, 24)),
        ("autoglm-phone-3b", 2.90, (20, 2816, 8576, 22)),
    ],
)
def test_the_last_checkpoint_has_the_size_that_the_recipe_is_named_after(
    name: str, parameters: float, sizes: tuple[int, ...]
):
    last = planned(name)[-1]
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    assert tuple(last["shape"][size] for size in names) == sizes
    assert last["shape"]["head_dim"] == 128
    assert last["shape"]["tie_word_embeddings"]
    assert round(last["parameters"] / 1e9, 2) == parameters
    # Weights and the cache of a full context, on a device of 8 GB.
    assert last["bytes"] + last["kv_cache_bytes_per_1000_tokens"] * CONTEXT_TOKENS / 1000 < 8e9


def test_depth_leaves_the_vision_tower_as_it_is_and_width_cuts_what_depends_on_it():
    nine, four = planned("autoglm-phone-9b"), planned("autoglm-phone-4b")
    for tower in ("vision", "adapter"):
        counts = [entry["parameters_by_part"][tower] for entry in nine]
        assert len(set(counts)) == 1
        before, after = four[2]["parameters_by_part"][tower], four[3]["parameters_by_part"][tower]
        assert before == counts[0] > after


def test_plan_shows_parts_with_shares(tmp_path: Path):
    recipe = RECIPES / "autoglm-phone-9b.yaml"
    shown = invoke("plan", recipe, "--set", f"model.source={GLM4V}", "--output", tmp_path).output
    assert "source: text layers 8.16G (79.3%), embedding 621M (6.0%), head 621M (6.0%), vision 707M (6.9%)" in shown
    assert "07-eval-int4: text layers 6.53G (81.2%)" in shown


def test_a_model_with_all_four_modules_gets_the_phones_size_and_keeps_both_towers():
    source, *_, last = plan(RECIPES / "autoglm-phone-omni.yaml", "--set", f"model.source={OMNI}")["checkpoints"]
    assert {"vision", "audio", "adapter"} < source["parameters_by_part"].keys()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    assert tuple(last["shape"][size] for size in names) == (24, 3072, 12288, 24)
    before, after = source["parameters_by_part"], last["parameters_by_part"]
    assert before["vision"] == after["vision"]
    # A projection from 1280, its bias and two tokens lose 1024 of the text's 4096 each; nothing else of the tower does.
    assert before["audio"] - after["audio"] == 1024 * (1280 + 1 + 2)
    assert last["bytes"] < 4.2e9
