"""Healing: it brings a cut model nearer to the original, resumes, and refuses what cannot work."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from autoglm_compress.calibration.training_rows import TextPart, random_rows, set_apart, training_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.healing.optimizer import learning_rate
from autoglm_compress.healing.options import HealingOptions, Lora
from autoglm_compress.healing.teacher_samples import continued
from autoglm_compress.healing.trained_weights import choose_trained
from autoglm_compress.progress import Progress
from support.command_line import assert_says, refusal
from support.running import compress, digests, half_written, load, run, run_until_killed, tensors_of, write_recipe

CUT = {"stage": "depth", "layers": [0, 1, 3]}
HEAL = {"stage": "heal", "tokens": 1024, "batch_size": 4, "checks": 2, "learning_rate": 2e-3}
LONGER = 2048  # tokens, after which text that was not trained on has gained too
LONG_CALIBRATION = {"source": "python-docs", "samples": 4, "sequence_length": 64}


def heal(folder: Path, source: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """Cut a layer and heal; the healed checkpoint and what is on record of it."""
    healed = compress(folder, source, CUT, HEAL | changes)
    return healed, json.loads((healed / "stage.json").read_text())["decisions"]


def changed(healed: Path) -> set[str]:
    """The tensors that healing changed."""
    before = tensors_of(healed.parent / "01-depth")
    return {name for name, tensor in tensors_of(healed).items() if not torch.equal(tensor, before[name])}


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm", num_hidden_layers=4)


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory, source: Path) -> tuple[Path, dict[str, Any]]:
    return heal(tmp_path_factory.mktemp("healed"), source, tokens=LONGER)


def test_predictions_come_nearer_to_the_originals(healed: tuple[Path, dict[str, Any]]):
    checkpoint, record = healed
    assert record["steps"] == LONGER // (4 * 32)
    assert [check["step"] for check in record["checks"]] == [0, 8, 16]
    assert record["kept"] == min(record["checks"], key=lambda check: check["divergence"])
    assert record["kept"]["divergence"] < 0.9 * record["checks"][0]["divergence"]
    assert [point["tokens"] for point in record["curve"]] == [128 * step for step in range(1, 17)]
    load(checkpoint)
    assert changed(checkpoint) == set(tensors_of(checkpoint))


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "ema": 0.5}], ids=["adamw", "muon and ema"])
def test_a_killed_run_goes_on_to_the_same_bytes(changes: dict[str, Any], tmp_path: Path, source: Path):
    undisturbed, _ = heal(tmp_path / "undisturbed", source, **changes)
    recipe = write_recipe(tmp_path, source, [CUT, HEAL | changes])
    assert run_until_killed(recipe, half_written("best-", call=2))  # with the state of the first check on disk
    assert "going on where an earlier run stopped" in run(recipe)
    assert digests(tmp_path / "out") == digests(undisturbed.parent)


def test_adapters_are_fp32_beside_bf16_weights():
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)}).bfloat16()
    choose_trained(model, ("self_attn.q_proj",), Lora(rank=2), quantized=False, seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [parameter.dtype for parameter in trained] == [torch.float32] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"teacher_top_k": 256},
        {"ema": 0.5},
        {"cross_entropy": 0.02, "micro_batch_size": 3},
        {"residual": 1.0, "gradient_checkpointing": True},
        {"random_tokens": 0.25, "residual": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_way_helps(changes: dict[str, Any], tmp_path: Path, source: Path):
    _, record = heal(tmp_path, source, tokens=LONGER, **changes)
    assert record["kept"]["divergence"] < 0.95 * record["checks"][0]["divergence"]


class Writer:
    """A model that counts on from the last token it is given; its states are that token, its head tells the next."""

    weight = torch.empty(0)

    def get_decoder(self) -> Any:
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=input_ids[..., None], past_key_values=None)

    def get_output_embeddings(self) -> "Writer":
        return self

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(states[:, 0] + 1, 512) * 1000.0


def test_the_teacher_goes_on_from_openings(tmp_path: Path, source: Path):
    rows = torch.arange(4 * 16, dtype=torch.int32).view(4, 16) * 10
    parts = [TextPart(rows[:3], 5, rows[3:])]
    progress, shape = Progress(Console(quiet=True)), Checkpoint(source).shape
    (found,) = continued(Writer(), shape, parts, 0, tmp_path, progress)
    assert len(found.rows) == found.wanted == 5
    assert found.rows[4].tolist() == [160, 170, *range(171, 185)]  # the second opening, for the second time
    (again,) = continued(None, shape, parts, 0, tmp_path, progress)  # what is written needs no writer
    assert torch.equal(found.rows, again.rows)
    # What decides goes on from the opening of a row that decides.
    assert found.deciding.tolist() == again.deciding.tolist() == [[480, 490, *range(491, 505)]]


def test_what_the_teacher_writes_is_trained_on(tmp_path: Path, source: Path):
    _, record = heal(tmp_path, source, data="teacher_samples", teacher_top_k=256, tokens=512)
    assert record["steps"] == 4


def test_random_tokens_reach_embeddings_that_the_text_does_not(
    tmp_path: Path, source: Path, healed: tuple[Path, dict[str, Any]]
):
    before = tensors_of(source)["model.embed_tokens.weight"]
    mixed, record = heal(tmp_path, source, random_tokens=0.5, tokens=LONGER)
    assert record["steps"] == healed[1]["steps"]
    of_text, of_both = (
        (tensors_of(checkpoint)["model.embed_tokens.weight"] != before).any(-1) for checkpoint in (healed[0], mixed)
    )
    assert of_text.float().mean() < 0.5
    # A token is in 1024 random ones with a probability of 1 - (1 - 1/512)^1024 = 86 %.
    assert of_both[~of_text].float().mean() > 0.5


def test_adapters_change_the_layers_linears_alone(tmp_path: Path, source: Path):
    healed, record = heal(tmp_path, source, lora={"rank": 8, "alpha": 16})
    assert record["kept"]["divergence"] < 0.95 * record["checks"][0]["divergence"]
    assert {name.split(".", 3)[-1] for name in changed(healed)} == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    }
    load(healed)


def test_a_dataset_is_streamed_from_a_folder(tmp_path: Path, source: Path):
    lines = [json.dumps({"body": f"line {number}: the quick brown fox jumps over the dog"}) for number in range(200)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    dataset = {"dataset": str(tmp_path / "data"), "column": "body"}
    _, record = heal(tmp_path / "run", source, data=dataset, sequence_length=32)
    assert record["kept"]["step"] > 0
    message = refusal(
        "run",
        write_recipe(tmp_path / "bad", source, [HEAL | {"data": dataset | {"column": "text"}, "sequence_length": 32}]),
    )
    assert_says(message, "no column 'text'", "body")


def test_another_teacher(tmp_path: Path, source: Path, make_checkpoint: Callable[..., Path]):
    _, own = heal(tmp_path / "own", source)
    _, named = heal(tmp_path / "named", source, teacher=str(source))
    assert own == named
    other = make_checkpoint("glm", vocab_size=520)
    recipe = write_recipe(tmp_path, source, [HEAL | {"teacher": str(other)}])
    assert_says(refusal("plan", recipe), "teacher", "520", "512", "same tokenizer")
    recipe = write_recipe(tmp_path, source, [HEAL | {"teacher": "nowhere"}])
    assert_says(refusal("plan", recipe), "nowhere")


def test_nothing_is_lost_where_nothing_helps(tmp_path: Path, source: Path):
    recipe = write_recipe(tmp_path, source, [CUT, HEAL | {"learning_rate": 1e30, "warmup": 0.0}])
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, "healing failed at step", "learning_rate")
    assert [path.name for path in (tmp_path / "out").glob("[0-9]*")] == ["01-depth"]


def test_without_any_gain_the_weights_stay(tmp_path: Path, source: Path):
    healed = compress(tmp_path, source, HEAL | {"checks": 1})  # a model that lost nothing
    record = json.loads((healed / "stage.json").read_text())["decisions"]
    assert record["kept"]["step"] == 0
    assert record["checks"][0]["divergence"] < 1e-3
    original = tensors_of(source)
    assert all(torch.equal(tensor, original[name]) for name, tensor in tensors_of(healed).items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": "many"}, ("tokens", "2M")),
        ({"tokens": 0}, ("tokens", "positive")),
        ({"tokens": 127}, ("tokens", "127", "4 rows of 32", "128 or more")),
        ({"residual": 1.0, "teacher_top_k": 8}, ("residual", "teacher_top_k")),
        ({"teacher_top_k": 512}, ("teacher_top_k", "512")),
        ({"micro_batch_size": 5}, ("micro_batch_size", "batch_size 4")),
        ({"optimizer": "sgd"}, ("optimizer", "adamw")),
        ({"cross_entropy": 1.5}, ("cross_entropy", "1")),
        ({"random_tokens": 1.0}, ("random_tokens", "less than 1")),
        ({"lora": {"rank": 0}}, ("lora", "rank")),
        ({"data": "wikipedia"}, ("data", "teacher_samples")),
        ({"data": {"dataset": "some"}}, ("sequence_length", "dataset")),
        ({"sequence_length": 1 << 20}, ("sequence_length", "max_position_embeddings")),
    ],
)
def test_bad_options_are_refused_before_work(
    changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path, source: Path
):
    assert_says(refusal("plan", write_recipe(tmp_path, source, [CUT, HEAL | changes])), *words)


@pytest.mark.parametrize(
    "how", [{"symmetric": True}, {"symmetric": False}, {"format": "awq"}], ids=["symmetric", "zero points", "awq"]
)
def test_a_quantized_checkpoint_keeps_its_integers(
    how: dict[str, Any], tmp_path: Path, source: Path, zero_points_load: None
):
    quantize = {"stage": "quantize", "bits": 4, "group_size": 32, "method": "round_to_nearest"} | how
    healed = compress(tmp_path, source, quantize, HEAL | {"learning_rate": 3e-3, "tokens": 2048})
    record = json.loads((healed / "stage.json").read_text())["decisions"]
    assert record["kept"]["divergence"] < record["checks"][0]["divergence"]
    before, after = tensors_of(tmp_path / "out" / "01-quantize"), tensors_of(healed)
    differ = {name.rsplit(".", 1)[-1] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert differ <= {"weight_scale", "scales", "weight", "bias"}
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert json.loads((healed / "config.json").read_text())["quantization_config"]["quant_method"]


def test_what_a_quantized_checkpoint_cannot_have(tmp_path: Path, source: Path):
    quantize = {"stage": "quantize", "bits": 8, "group_size": 32}
    for number, (change, words) in enumerate([({"lora": {}}, "merged"), ({"optimizer": "muon"}, "adamw")]):
        recipe = write_recipe(tmp_path / str(number), source, [quantize, HEAL | change])
        assert_says(refusal("plan", recipe), *change, words)
    recipe = write_recipe(tmp_path, source, [quantize, HEAL, CUT])
    assert_says(refusal("plan", recipe), "depth", "quantized")


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    options = HealingOptions(tokens=1, learning_rate=1.0, warmup=0.1, final_learning_rate=0.2)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[55] == pytest.approx(0.6)
    assert rates[99] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 89 / 90)) / 2)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_every_source_keeps_its_share_and_holds_rows_out(sizes: list[tuple[int, int, bool]], seed: int):
    def part(source: int, rows: int, wanted: int, kept: bool) -> TextPart:
        text = torch.full((rows + kept, 4), source, dtype=torch.int32)
        text[:, 1] = torch.arange(rows + kept)
        return TextPart(text[:rows], wanted, text[rows:]) if kept else set_apart(text, wanted, 5)

    parts = [part(source, *size) for source, size in enumerate(sizes)]
    data = training_rows([*parts, random_rows(7, 4, 100, seed)], seed)
    assert len(data.order) == sum(wanted for _, wanted, _ in sizes) + 7
    start = 0
    for source, ((rows, wanted, _), found) in enumerate(zip(sizes, parts, strict=True)):
        own = data.order[(data.order >= start) & (data.order < start + len(found.rows))]
        trained = data.rows[own]
        assert trained[:, 0].tolist() == [source] * wanted
        assert 1 <= len(found.deciding) <= 5
        decides = set(found.deciding[:, 1].tolist())
        assert (len(found.rows) == rows == 1) or not set(trained[:, 1].tolist()) & decides
        times = torch.bincount(own - start, minlength=len(found.rows))
        assert min(wanted, len(found.rows)) == (times > 0).sum()
        assert times[times > 0].max() - times[times > 0].min() <= 1
        start += len(found.rows)
    assert sorted(data.order[data.order >= start].tolist()) == list(range(start, start + 7))
    judging = torch.cat([found.deciding for found in parts])
    assert torch.equal(data.rows[data.held_out], judging)  # and no random rows
    assert int(data.held_out.min()) == start + 7
