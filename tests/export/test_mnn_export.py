"""Exports to MNN through recipes: what is in the files, and what the engine makes of it, for every family."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export import engine_process
from autoglm_compress.hashing import sha256
from support.command_line import assert_says, plan, refusal
from support.engines import Forked
from support.exporting import COMMON_SHAPES, export, quantize, recipe_of, record, run_stages, stage_folder
from support.mnn_files import graph, linear
from support.models import FAMILIES
from support.onnx_files import exact_weight
from support.running import digests, invoke, just_written, run, run_until_killed

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
Make = Callable[..., Path]
OTHER = {
    "auto": {"bits": "auto", "budget": {"average_bits": 6}, "group_size": 32},
    "rows": {"bits": 4, "group_size": -1, "head_bits": 8},
}
KINDS = {
    "llama": "awq",
    "mistral": "int4",
    "qwen2": "zeros",
    "qwen3": "int8",
    "glm": "auto",
    "glm4": "rows",
}
FILES = ("llm.mnn", "llm.mnn.weight", "embeddings.bin", "tokenizer.mtok", "config.json", "llm_config.json")
NEIGHBOURS = ("glm", "glm4")


def mnn(checkpoint: str, **options: Any) -> dict[str, Any]:
    """A stage that exports to MNN, called after the checkpoint it takes."""
    return export(checkpoint, **({"name": f"{checkpoint}-mnn", "format": "mnn"} | options))


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "subprocess", Forked())


def in_graph_order(weight: torch.Tensor, head_dim: int, turned: int) -> torch.Tensor:
    """Rows of q/k of a family that turns neighbours: partners stand half a head apart, and the rest beside them."""
    rows = []
    for start in range(0, len(weight), head_dim):
        half = (head_dim - turned) // 2
        for part in (0, 1):
            rows += [start + channel for channel in range(part, turned, 2)]
            rows += [start + turned + part * half + n for n in range(half)]
    return weight[rows]


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_kind_of_weights_is_exact_and_proven(family: str, make_checkpoint: Make, tmp_path: Path):
    kind = KINDS[family]
    run_stages(tmp_path, make_checkpoint(family), quantize(kind, **OTHER.get(kind, {})), mnn(kind))
    folder, checkpoint = stage_folder(tmp_path / "out", f"{kind}-mnn"), Checkpoint(stage_folder(tmp_path / "out", kind))
    whole = graph(folder)
    assert ("lm_head" in checkpoint.shape.schemes) == (kind == "rows")
    for module in checkpoint.shape.schemes:
        exact, found = exact_weight(checkpoint, module), linear(folder, whole, module).double()
        if module.endswith(("q_proj", "k_proj")) and family in NEIGHBOURS:
            exact = in_graph_order(exact, checkpoint.shape.head_dim, checkpoint.shape.head_dim // 2)
        # With zero points, the engine adds the minimum in fp32.
        assert (found - exact).abs().max() <= (1e-6 if kind in ("awq", "zeros") else 0), module
    decided = record(folder)
    assert decided["verified"] is True
    assert decided["proof"]["kl_divergence"] < 1e-9
    assert 1e-9 < decided["proof"]["low_memory_kl_divergence"] < 5e-3
    assert decided["proof"]["same_greedy_token"] == 1
    assert decided["rounded"]["largest_relative_error"] < 1e-6
    assert decided["bytes"] == sum((folder / file).stat().st_size for file in FILES)
    types = {name for name in decided["bytes_by_type"] if name.startswith("INT")}
    assert types == {"auto": {"INT4", "INT8"}, "rows": {"INT4", "INT8"}, "int8": {"INT8"}}.get(kind, {"INT4"})
    assert ("notes" in decided) == (family == "qwen2")  # whose tokenizer splits blanks by \\s*[\\r\\n]+


SHAPES = {
    "a quarter rotary": COMMON_SHAPES["a quarter rotary"],
    "fp32": COMMON_SHAPES["fp32"],
    "tied, yarn": ("qwen3", COMMON_SHAPES["tied"][1] | COMMON_SHAPES["yarn"][1]),
    "wide heads, llama3": ("llama", COMMON_SHAPES["wide heads"][1] | COMMON_SHAPES["llama3"][1]),
}


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("case", SHAPES)
def test_what_sets_models_apart_reaches_the_engine(case: str, make_checkpoint: Make, tmp_path: Path):
    """In 16 bits."""
    family, changes = SHAPES[case]
    recipe = recipe_of(tmp_path, make_checkpoint(family, **changes), mnn("source"))
    planned = plan(recipe)["checkpoints"][-1]
    run(recipe)
    folder = stage_folder(tmp_path / "out", "source-mnn")
    assert record(folder)["proof"]["kl_divergence"] < 1e-6
    assert (folder / "embeddings.bin").exists() == (case != "tied, yarn")
    written = sum(path.stat().st_size for path in folder.iterdir() if path.name not in ("stage.json", "plot.svg"))
    assert 0 <= planned["disk_bytes"] - written < 300_000


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("tied", [False, True])
def test_eight_bits_for_the_ends_halve_their_bytes_and_their_cost_is_told(
    tied: bool, make_checkpoint: Make, tmp_path: Path
):
    """Against the bytes of a head in 16 bits, and of an embedding that a tied model has not beside it."""
    recipe = recipe_of(
        tmp_path, make_checkpoint("llama", tie_word_embeddings=tied), mnn("source", name="small", embedding_bits=8)
    )
    output, folder = run(recipe), stage_folder(tmp_path / "out", "small")
    rounded = record(folder)
    assert rounded["bytes_by_type"]["INT8"] == 512 * 64 * (1 if tied else 2) * (1 + 4 / 32)
    assert (folder / "llm.mnn.weight").stat().st_size + (0 if tied else 512 * (64 + 8)) == pytest.approx(
        sum(rounded["bytes_by_type"].values()), abs=2500
    )
    cost = rounded["embedding_bits"]["kl_divergence"]
    assert 0 < cost < 5e-3
    assert rounded["proof"]["kl_divergence"] == pytest.approx(cost, rel=0.5)
    assert "embedding and head in 8 bits cost a KL divergence of" in output
    before = {file: sha256(folder / file) for file in FILES if (folder / file).exists()}
    assert run(recipe).count("finished before, reused") == 1
    assert {file: sha256(stage_folder(tmp_path / "out", "small") / file) for file in before} == before


@pytest.mark.usefixtures("_forked")
def test_an_export_that_was_killed_while_its_files_were_moved_goes_on_to_the_same_bytes(
    make_checkpoint: Make, tmp_path: Path
):
    """The one that is killed has the converter in a process of its own, as users have."""
    source = make_checkpoint("llama", tie_word_embeddings=True)
    killed, undisturbed = (recipe_of(tmp_path / name, source, mnn("source")) for name in ("killed", "undisturbed"))
    assert run_until_killed(killed, just_written("mnn/llm.mnn.weight"))
    work = tmp_path / "killed" / "out"
    assert list(work.rglob("llm.mnn.weight"))
    assert not list(work.glob("[0-9]*"))
    for recipe in (killed, undisturbed):
        run(recipe)
    assert digests(work) == digests(tmp_path / "undisturbed" / "out") != {}


@pytest.mark.usefixtures("_forked")
def test_the_folder_is_one_that_a_person_can_use(make_checkpoint: Make, tmp_path: Path):
    """By the command."""
    result = invoke(
        *("export", make_checkpoint("mistral"), "--format", "mnn", "--output", tmp_path / "out", "--called", "tiny")
    )
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {
        *FILES,
        *("README.md", "SHA256SUMS", "export.json"),
    }
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert sums.returncode == 0, sums.stderr
    assert_says(sums.stdout, "llm.mnn.weight: OK", "embeddings.bin: OK")
    card = (folder / "README.md").read_text()
    assert_says(card, "tags:\n- mnn", "llm_demo config.json", "# tiny", "With memory low", "adb push")
    assert json.loads((folder / "llm_config.json").read_text())["sliding_window"] == 8
    code = card.split("```python\n")[1].split("```")[0]
    said = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True)
    # What a random model says is no text.
    assert said.returncode == 0 or said.stderr.strip().splitlines()[-1].startswith(b"UnicodeDecodeError"), said.stderr


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ["config.json", "hidden_act gelu", "silu"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type dynamic"]),
    ],
)
def test_a_config_that_the_graph_lacks_is_refused_before_work(
    changes: dict, words: list[str], make_checkpoint: Make, tmp_path: Path
):
    recipe = recipe_of(tmp_path, make_checkpoint("llama", **changes), mnn("source"))
    assert_says(refusal("plan", recipe), *words)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_forked")
def test_what_no_file_holds_is_refused_with_the_line(make_checkpoint: Make, tmp_path: Path):
    odd = make_checkpoint("glm", hidden_size=48)
    message = refusal("plan", recipe_of(tmp_path, odd, mnn("source", embedding_bits=8)))
    assert_says(message, "stages.1.embedding_bits", "48 inputs do not divide by 32")
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), mnn("source"))
    assert_says(refusal("run", recipe, "--output", tmp_path / "out", "--memory-limit", "1MB"), "--memory-limit")


@pytest.mark.usefixtures("_forked")
def test_low_memory_is_not_the_default_where_it_is_far_from_exact(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("autoglm_compress.export.mnn_format.LOW_MEMORY", 1e-9)
    said = run_stages(tmp_path, make_checkpoint("llama"), quantize("int4"), mnn("int4"))
    folder = stage_folder(tmp_path / "out", "int4-mnn")
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["memory"], settings["precision"]) == ("high", "high")
    assert_says(said, "config.json has memory high, which is slower")
    assert record(folder)["verified"] is True
