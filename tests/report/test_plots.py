"""The plot beside each `stage.json`: it can be drawn from the record alone, and is never in the way of a run."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch

from autoglm_compress.stages import Makes, Stage, drawing, stage_types
from autoglm_compress.stages.drawing import draw
from support.running import run, stage_folders, write_recipe

torch.set_num_threads(1)
LARGEST = 100_000
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
BEFORE = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
SHAPE = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 96, "num_key_value_heads": 2}
STAGES = [
    {"stage": "depth", "layers": [0, 1]},
    {"stage": "heads", "num_attention_heads": 6, "method": "magnitude"},
    {"stage": "ffn", "intermediate_size": 96, "method": "magnitude"},
    {"stage": "width", "hidden_size": 32},
    {"stage": "tie"},
    {"stage": "refit"},
    {"stage": "quantize", "bits": 4, "group_size": 32},
]


def record(stage: str, decisions: dict[str, Any], **options: Any) -> dict[str, Any]:
    """As much of a `stage.json` as a plot may ask for."""
    options = {"stage": stage, "name": None, "method": "some_method"} | options
    return {"options": options, "shape_before": BEFORE, "shape": SHAPE, "decisions": decisions}


def depth(scores: Any, kept: tuple[int, ...] = (0, 1, 4, 5)) -> dict[str, Any]:
    return record("depth", {"method": "some_method", "kept_layers": list(kept), "scores": scores})


def refit(*errors: tuple[float | None, float, float], head: bool = True) -> dict[str, Any]:
    """A layer for each strength, error before and error after."""
    fits = [dict(zip(("strength", "error_before", "error_after"), error, strict=True)) for error in errors]
    layers = [dict.fromkeys(LINEARS, fit) for fit in fits]
    return record("refit", {"layers": layers} | ({"head": fits[0]} if head else {}))


def distilled(*layers: int, head: bool, **options: Any) -> dict[str, Any]:
    """A refit with gradient descent after the fits: of some layers, where it helps, or the head, where it does not."""
    found = refit((0.1, 0.5, 0.25), (None, 0.4, 0.4), (0.1, 0.3, 0.2), head=head)
    helped, did_not = {"loss_before": 0.3, "loss_after": 0.2}, {"loss_before": 0.4, "loss_after": 0.5}
    found["decisions"]["distilled_layers"] = [helped if layer in layers else None for layer in range(3)]
    found["decisions"]["distilled_head"] = did_not if head else None
    return found | {"options": found["options"] | options}


def quantize(options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    layers = [{"weight_error": dict.fromkeys(LINEARS, 0.1)} | more] * 4
    return record("quantize", {"layers": layers}, **({"bits": 4, "group_size": 32} | (options or {})))


def width(**found: Any) -> dict[str, Any]:
    norms = [f"model.layers.{layer}.{norm}.weight" for layer in range(4) for norm in ("input_norm", "other_norm")]
    gains = {name: 0.9 + 0.01 * number for number, name in enumerate([*norms, "model.norm.weight"])}
    return record("width", {"method": "some_method", "gains": gains} | found)


def heal(*divergences: float) -> dict[str, Any]:
    checks = [{"step": n, "tokens": 100 * n, "divergence": divergence} for n, divergence in enumerate(divergences)]
    curve = [{"tokens": 50 * n, "loss": 1 / n, "learning_rate": 1e-3} for n in range(1, 5)]
    kept = min(checks, key=lambda check: check["divergence"])
    return record("heal", {"steps": 2, "curve": curve, "checks": checks, "kept": kept})


HEADS = {"kept_heads": [0, 3], "kept_kv_heads": [0, 1], "scores": [3.0, 1.0, 0.0, 2.0]}
PAIRS = {"input_layernorm": {"output_error": 0.02}, "mlp.up_proj": {"output_error": 0.0}}
RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "depth by a score per layer": (depth([0.5, 0.4, 0.01, 0.02, 0.3, 0.2]), "4 of 6 layers kept, some method"),
    "depth by random scores": (depth([0.0, 0.4, 0.1, 0.0, 0.3, 0.2]), "4 of 6 layers kept, some method"),
    "depth by blocks": (depth({"block_distances": [0.3, 0.2, 0.1, 0.2, 0.3]}), "a block from this layer"),
    "depth by gaps": (depth({"total_cost": 0.1, "gaps": [{"layers": [2, 3], "cost": 0.1}]}), "in all 0.1"),
    "depth by removal": (depth({"removed": [{"layer": n, "kl_divergence": 0.1 * n} for n in (3, 2)]}), "KL divergence"),
    "depth by list": (depth(None, (0, 1, 2, 3)), "4 of 6 layers kept"),
    "depth by what is not known here": (depth({"something": 1}), "4 of 6 layers kept"),
    "heads": (record("heads", {"layers": [HEADS] * 6}), "2 of 4 query heads kept in every layer, 2 of 2 KV groups"),
    "ffn": (
        record("ffn", {"layers": [{"kept_share_of_score": share} for share in (1.0000001, 0.9, 0.75)]}),
        "96 of 128 neurons kept in every layer, some method; layer 2 keeps the least of its score, 75.0 %",
    ),
    "width by directions": (width(share_of_energy=0.97), "32 of 64 directions kept, some method, 97.0 % of the energy"),
    "width by channels": (width(kept_channels=[1, 2]), "32 of 64 channels kept, some method"),
    "tie": (record("tie", {"input_error": 1.25, "output_error": 0.05}), "1.25"),
    "share_adapter": (
        record(
            "share_adapter",
            {
                "errors": {
                    "average": {"image": 0.8, "audio": 0.7},
                    "closed_form": {"image": 0.3, "audio": 0.2},
                    "trained": {"audio": 0.1},
                },
                "trained": True,
            },
        ),
        "Share adapter, kept: and what is before it trained",
    ),
    "refit": (refit((0.001, 0.5, 0.25), (1.0, 0.9, 0.8)), "worst: 0.9 → 0.8, layer 1, self_attn.q_proj"),
    "refit with nothing to do": (refit((None, 0.0, 0.0), head=False), "kept as it was"),
    "refit of one layer": (refit((0.1, 0.5, 0.25), head=False), "strength 0.1"),
    "refit of the head to logits": (distilled(head=True, logit_passes=3), "next-token KL divergence: 0.4 → 0.4"),
    "refit of the last layer to logits": (
        distilled(2, head=False, logit_passes=3),
        "next-token KL divergence: 0.3 → 0.2",
    ),
    "refit of layers as a whole": (distilled(0, 1, 2, head=False, layer_passes=3), "gradient descent"),
    "heal": (heal(0.8, 0.5, 0.6), "0.8 → 0.5 nats after 0.0001 M tokens"),
    "heal in vain": (heal(0.1, 0.2), "nothing was better than the start"),
    "attention": (
        record("attention", {"top_k": [64, None], "agreement": {"sequence_length": 512, "kl_divergence": 0.02}}),
        "288 of 512 tokens chosen by layers on average, everything by 1 of 2; held-out KL divergence 0.02 nats",
    ),
    "quantize by awq": (quantize(pairs=PAIRS), "reads the output of"),
    "quantize to mixed bits": (quantize({"bits": "auto", "group_size": -1}), "INT4 and INT8, a scale per output"),
    "quantize by rounding": (quantize(), "INT4, groups of 32"),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_every_kind_of_decision_has_a_plot(name: str):
    found, words = RECORDS[name]
    plot = draw(found)
    assert plot == draw(json.loads(json.dumps(found)))
    assert ElementTree.fromstring(plot).tag.endswith("svg")
    assert words in plot.decode()
    assert len(plot) < LARGEST


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_older_versions_can_be_drawn(name: str):
    found = {key: value for key, value in RECORDS[name][0].items() if key != "shape_before"}
    assert draw(found)


def test_every_stage_that_makes_a_checkpoint_has_a_plot():
    ours = [kind for kind in stage_types().values() if kind.__module__.startswith("autoglm_compress.")]
    drawn = {kind for kind in ours if kind.plot.__func__ is not Stage.plot.__func__}
    assert {kind for kind in ours if kind.makes is Makes.CHECKPOINT} == drawn


@pytest.mark.parametrize(
    "nothing",
    [
        record("someone_elses", {"found": 1}),
        record("tie", {}),
        record("width", {"method": "nothing to remove"}),
        record("quantize", {"agreement": {"kl_divergence": 0.01}}, bits=4, group_size=32),
    ],
)
def test_where_nothing_was_decided_there_is_no_plot(nothing: dict[str, Any]):
    assert draw(nothing) is None


def test_a_large_model_has_a_small_plot():
    chance = random.Random(0)
    fits = [(chance.choice((None, 0.1, 1.0)), chance.random(), chance.random()) for _ in range(40)]
    heads = [{**HEADS, "scores": [chance.random() for _ in range(64)]} for _ in range(40)]
    for found in (refit(*fits), record("heads", {"layers": heads})):
        assert len(draw(found)) < LARGEST


def test_the_style_of_others_is_not_touched_and_does_not_matter():
    found = RECORDS["ffn"][0]
    plot = draw(found)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "svg.fonttype": "path"}):
        assert draw(found) == plot
        assert matplotlib.rcParams["font.size"] == 20


@pytest.fixture(scope="module")
def recipe(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of every stage that has a plot."""
    recipe = write_recipe(tmp_path_factory.mktemp("run"), make_checkpoint("glm"), STAGES)
    assert "no plot" not in run(recipe, pictures=True)
    return recipe


def plots(recipe: Path) -> list[bytes]:
    """The plots of a run, one for each stage."""
    return [(folder / "plot.svg").read_bytes() for folder in stage_folders(recipe.parent / "out")]


def test_a_run_draws_each_stage_from_its_record(recipe: Path):
    records = [json.loads((folder / "stage.json").read_text()) for folder in stage_folders(recipe.parent / "out")]
    assert plots(recipe) == [draw(found) for found in records]
    assert len(records) == len(STAGES)
    assert b"2 of 4 layers kept" in plots(recipe)[0]


def test_a_plot_that_is_gone_is_drawn_again_and_nothing_else_is_done(recipe: Path):
    before = plots(recipe)
    (stage_folders(recipe.parent / "out")[3] / "plot.svg").unlink()
    output = run(recipe, pictures=True)
    assert output.count("finished before, reused") == len(STAGES)
    assert "running" not in output
    assert plots(recipe) == before


def test_a_plot_that_fails_costs_the_plot_alone(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: dict[str, Any]) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(drawing, "draw", fail)
    output = run(write_recipe(tmp_path, make_checkpoint("glm"), STAGES[:2]), pictures=True)
    assert output.count("no plot.svg: KeyError: 'no such thing'") == 2
    assert [folder.name for folder in stage_folders(tmp_path / "out")] == ["01-depth", "02-heads"]
    assert not list(tmp_path.rglob("*.svg"))
