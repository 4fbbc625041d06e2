"""`autoglm-compress push`, against a stand-in for the hub: what arrives there, and what is refused."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from autoglm_compress import push
from support.command_line import assert_says, refusal
from support.exporting import export, quantize, run_stages
from support.hub import READER, TOKEN, Hub, serving
from support.running import invoke

torch.set_num_threads(1)
Make = Callable[..., Path]
REPO = "me/tiny"
RECORDS = {"stage.json", "lineage.json", "plot.svg", "export.json"}


@pytest.fixture(scope="module")
def run_folder(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that cuts, quantizes, exports and measures, of a source whose card names a license."""
    folder = tmp_path_factory.mktemp("run")
    source = shutil.copytree(make_checkpoint("glm"), folder / "models--maker--original" / "snapshots" / "1")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# The original\n")
    evaluation = {"every_stage": ["perplexity"], "perplexity": {"samples": 2, "sequence_length": 32}}
    stages = [{"stage": "depth", "layers": [0, 1]}, quantize("int4", **{"from": "depth"}), export("int4")]
    run_stages(folder, source, *stages, evaluation=evaluation)
    return folder / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that the hub's client takes for the hub."""
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def pushed(folder: Path, *options: object) -> str:
    result = invoke("push", folder, REPO, *options)
    assert result.exit_code == 0, result.output
    return result.output


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dry_run_sends_nothing_and_tells_all(run_folder: Path, hub: Hub):
    output = pushed(run_folder / "int4")
    assert hub.requests == []
    sizes = {path.name: path.stat().st_size for path in (run_folder / "02-int4").iterdir()}
    assert_says(output, "library_name: transformers", f"to: {hub.address}/{REPO} (public", "nothing was uploaded")
    found = push(run_folder / "02-int4", REPO)
    assert not found.uploaded
    assert found.card in output
    assert found.files.keys() - {"README.md"} == sizes.keys() - RECORDS
    assert all(found.files[name] == sizes[name] for name in found.files.keys() - {"README.md"})
    assert found.bytes == sum(found.files.values())
    assert all(name in output for name in found.files)
    assert "README.md" not in sizes


def test_a_checkpoint_of_a_run_arrives_byte_for_byte_with_a_card(run_folder: Path, hub: Hub):
    before = bytes_of(run_folder / "02-int4")
    output = pushed(run_folder / "int4", "--upload", "--private")
    assert f"uploaded: {hub.address}/{REPO}" in output
    assert hub.private == {REPO: True}
    arrived = dict(hub.repos[REPO])
    card = arrived.pop("README.md").decode()
    assert arrived == {name: content for name, content in before.items() if name not in RECORDS}
    assert hub.blobs  # the weights went the way of large files
    assert bytes_of(run_folder / "02-int4") == before

    head, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "base_model": "maker/original",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "base_model_relation": "quantized",
        "tags": ["autoglm-compress", "compressed-tensors"],
    }
    assert_says(
        text, "# tiny\n", "INT4, groups of 32", "| 01-depth | depth |", "| 02-int4 | quantize |", "× the source"
    )
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["model"] == {"source": "maker/original"}
    assert [stage["stage"] for stage in recipe["stages"]] == ["depth", "quantize", "export"]
    assert str(run_folder.parent) not in card
    assert "03-int4-gguf" not in text

    again = len(hub.requests)
    pushed(run_folder / "int4", "--upload", "--private")
    assert hub.repos[REPO] == arrived | {"README.md": card.encode()}
    assert len(hub.requests) > again


def test_an_export_arrives_with_the_card_that_it_has(run_folder: Path, hub: Hub, tmp_path: Path):
    of_run = bytes_of(run_folder / "03-int4-gguf")
    pushed(run_folder / "int4-gguf", "--upload")
    assert hub.repos[REPO] == {name: content for name, content in of_run.items() if name not in RECORDS}
    card = of_run["README.md"].decode()
    assert_says(card, "base_model: maker/original", "base_model_relation: quantized", "license: mit", "- gguf")
    assert_says(card, "× the source's", "| 02-int4 | quantize |", "stage: export")
    assert str(run_folder.parent) not in card

    out = tmp_path / "out"
    assert (
        invoke("export", run_folder / "02-int4", "--format", "gguf", "--output", out, "--device", "cpu").exit_code == 0
    )
    hub.repos[REPO].clear()
    pushed(out, "--upload")
    assert hub.repos[REPO] == {name: content for name, content in bytes_of(out).items() if name not in RECORDS}
    (out / "Modelfile").unlink()
    assert_says(refusal("push", out, REPO), "Modelfile: missing")


def test_a_checkpoint_of_no_run_keeps_its_own_card(make_checkpoint: Make, hub: Hub, tmp_path: Path):
    model = shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    for name in ("optimizer.pt", "manifest.txt", ".lock", "modeling_own.py", "LICENSE"):
        (model / name).write_text(name)
    assert_says(pushed(model), "# tiny", "architecture | LlamaForCausalLM")
    (model / "README.md").write_text("# My own\n")
    pushed(model, "--upload")
    names = {path.name for path in make_checkpoint("llama").iterdir()} | {"modeling_own.py", "LICENSE", "README.md"}
    assert hub.repos[REPO].keys() == names
    assert hub.repos[REPO]["README.md"] == b"# My own\n"


def test_the_command_takes_the_address_and_the_token_from_the_environment(make_checkpoint: Make, hub: Hub):
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "autoglm_compress", "push", str(make_checkpoint("llama")), REPO, "--upload"]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert hub.repos[REPO].keys() == {path.name for path in make_checkpoint("llama").iterdir()} | {"README.md"}


def test_what_the_hub_refuses_is_one_message_before_weights_are_read(
    make_checkpoint: Make, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    def refused(*options: object) -> str:
        return refusal("push", make_checkpoint("llama"), REPO, "--upload", *options)

    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert_says(refused(), f"{REPO}: the hub did not take it", "401", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert_says(refused(), "403", "role write")
    hub.repos[REPO], hub.private[REPO] = {}, False
    assert_says(refused(), "403", "role write")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_says(refused("--private"), "everybody can see it")
    hub.repos[REPO]["model-00001-of-00002.safetensors"] = b"old"
    assert_says(refused(), "other weights", "model-00001-of-00002.safetensors")
    assert hub.blobs == {}
    assert list(hub.repos[REPO]) == ["model-00001-of-00002.safetensors"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_says(refused(), "offline mode is enabled")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_says(refused(), "http://127.0.0.1:9/me/tiny reached from here?")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert_says(refused(), "no token", "HF_TOKEN")


@pytest.mark.parametrize("repo", ["tiny", "me/ti ny", "me/you/tiny", "me/tiny.git", ""])
def test_a_bad_name_of_a_repo_is_refused(repo: str, tmp_path: Path):
    assert_says(refusal("push", tmp_path, repo), f"{repo}: not a repo on the hub", "OWNER/NAME")


def test_what_is_not_whole_is_refused(run_folder: Path, tmp_path: Path):
    def refused(folder: Path) -> str:
        return refusal("push", folder, REPO, "--upload")

    out = shutil.copytree(run_folder, tmp_path / "out")
    assert_says(refused(tmp_path / "none"), "no such folder")
    assert_says(refused(out), "whole run", "03-int4-gguf")
    assert_says(refused(out / "evaluations"), "no config.json")
    result = shutil.copytree(out / "02-int4", out / ".work/02-int4/result")
    assert_says(refused(result), "is not finished")
    weights = next((out / "02-int4").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    assert_says(refused(out / "int4"), f"{weights.name}: missing, or not as the stage left it")
    record = (out / "01-depth/stage.json").read_text()
    (out / "01-depth/stage.json").write_text(record.replace('"makes": "checkpoint"', '"makes": "measurement"'))
    assert_says(refused(out / "depth"), "holds measurements")
    (out / "01-depth/stage.json").write_text(record[:-3] + ',"dropped": true}')
    assert_says(refused(out / "depth"), "weights were deleted")
