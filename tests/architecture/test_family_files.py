"""Where families come from: the package, a file that a recipe or an option names, other packages."""

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from autoglm_compress.architecture import family_files, family_of, read_family, supported_architectures
from autoglm_compress.architecture.family import TEXT, Place
from autoglm_compress.errors import UserError
from support.command_line import assert_says, refusal
from support.own_families import GLM4V, LFM2, write_family
from support.places import ROOT
from support.running import invoke, run, write_recipe

BUILT_IN = ROOT / "autoglm_compress" / "architecture" / "families"
DEPTH = {"stage": "depth", "layers": [0, 1]}
AddFamily = Callable[..., None]


@pytest.fixture
def add_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[AddFamily]:
    """Adds an entry point whose object is given, or which fails with an error."""
    entries, find = [], metadata.entry_points
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda **chosen: entries if chosen == {"group": family_files.GROUP} else find(**chosen),
    )

    def add(name: str, given: object) -> None:
        def load() -> object:
            if isinstance(given, Exception):
                raise given
            return given

        dist = SimpleNamespace(name="their-package", version="2.1")
        entries.append(SimpleNamespace(name=name, value=f"theirs:{name}", load=load, dist=dist))
        family_files.plug_ins.cache_clear()

    family_files.plug_ins.cache_clear()
    yield add
    family_files.plug_ins.cache_clear()


def llama_as(architecture: str) -> str:
    return (BUILT_IN / "llama.yaml").read_text().replace("LlamaForCausalLM", architecture)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.language_model.layers.12.mlp.down_proj.weight", Place(TEXT, 12, "mlp.down_proj.weight")),
        ("model.language_model.layers.0.self_attn.o_proj", Place(TEXT, 0, "self_attn.o_proj")),
        ("model.language_model.norm.weight", Place(TEXT, None, "model.language_model.norm.weight")),
        ("lm_head.weight", Place(TEXT, None, "lm_head.weight")),
        ("model.visual.blocks.3.mlp.up_proj.weight", Place("vision", None, "model.visual.blocks.3.mlp.up_proj.weight")),
        ("model.layers.0.mlp.up_proj.weight", Place(TEXT, None, "model.layers.0.mlp.up_proj.weight")),
        ("model.language_model.layers.x.weight", Place(TEXT, None, "model.language_model.layers.x.weight")),
    ],
)
def test_names_are_taken_apart(name: str, place: Place, tmp_path: Path):
    assert read_family(write_family(tmp_path, GLM4V)).place(name) == place


def test_norms_are_told_by_what_they_produce():
    family = family_of({"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}, "config.json")
    assert family.norm_readers == {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
    }
    assert "self_attn.v_proj" in family.smoothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefx": "model."}, ["prefx: unknown key"]),
        ({"roles": None}, ["roles: expected a mapping"]),
        ({"architecture": ...}, ["architecture: missing"]),
        ({"auto_class": "torch"}, ["auto_class: "]),
        ({"prefix": "model"}, ["prefix: expected the beginning of tensor names", "'model.'"]),
        ({"layer_tensors": {"a.weight": ["hiden"]}}, ["layer_tensors.a.weight.axes: unknown axes hiden: known are"]),
        ({"layer_tensors": {"a.weight": [0]}}, ["layer_tensors.a.weight"]),
        ({"layer_tensors": {"a.weight": {"axis": ["hidden"]}}}, ["layer_tensors.a.weight.axis: unknown key"]),
        ({"layer_tensors": {"a.weight": ["hidden"]}}, ["roles.attention.query", "self_attn.q_proj.weight"]),
        ({"smoothing": {"norm": ["mlp.up_proj"]}}, ["smoothing.norm: norm.weight is not in layer_tensors"]),
        ({"smoothing": {"mlp.up_proj": ["mlp.gate_proj"]}}, ["mlp.gate_proj has [intermediate, hidden]"]),
        ({"writer_norms": {"mlp.down_proj": "norm"}}, ["writer_norms.mlp.down_proj: norm.weight"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(changes: dict, words: list[str], tmp_path: Path, glm: Path):
    data = yaml.safe_load((BUILT_IN / "llama.yaml").read_text()) | changes
    file = write_family(tmp_path, yaml.safe_dump({key: value for key, value in data.items() if value is not ...}))
    assert_says(refusal("inspect", glm, "--family", file), str(file), "does not describe a family", *words)


def test_kinds_need_the_list_that_tells_them(tmp_path: Path, glm: Path):
    file = write_family(tmp_path, LFM2.replace("layer_kinds: layer_types\n", ""))
    assert_says(refusal("inspect", glm, "--family", file), "layer_tensors.conv.in_proj.weight.kinds", "layer_kinds")


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_a_file_that_is_no_mapping_is_named(text: str, tmp_path: Path, glm: Path):
    file = write_family(tmp_path, text)
    assert_says(refusal("inspect", glm, "--family", file), str(file))


def test_a_file_that_is_not_there_is_named(glm: Path, tmp_path: Path):
    assert_says(refusal("inspect", glm, "--family", "gone.yaml"), "--family: no file 'gone.yaml'")
    recipe = write_recipe(tmp_path, glm, [DEPTH], model={"source": str(glm), "family": "gone.yaml"})
    assert_says(refusal("plan", recipe), "model.family: no file 'gone.yaml'", str(tmp_path))


def test_a_family_of_another_architecture_is_refused(glm: Path, tmp_path: Path):
    write_family(tmp_path, llama_as("LlamaForCausalLM"))
    recipe = write_recipe(tmp_path, glm, [DEPTH], model={"source": str(glm), "family": "my_family.yaml"})
    assert_says(refusal("plan", recipe), "model.family: describes LlamaForCausalLM", "GlmForCausalLM")
    file, output = tmp_path / "my_family.yaml", tmp_path / "results.json"
    for command in (["inspect", glm], ["evaluate", glm, "--output", output, "--tasks", "perplexity"]):
        assert_says(refusal(*command, "--family", file), "--family: describes LlamaForCausalLM", "GlmForCausalLM")


def test_a_recipes_family_is_part_of_the_key(glm: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, glm, [DEPTH])
    run(recipe)
    key = json.loads((tmp_path / "out" / "01-depth" / "stage.json").read_text())["key"]
    named = {"source": str(glm), "family": "my_family.yaml"}
    file = write_family(tmp_path, (BUILT_IN / "glm.yaml").read_text())
    write_recipe(tmp_path, glm, [DEPTH], model=named)
    assert "done again" in run(recipe)
    assert "finished before, reused" in run(recipe)
    file.write_text(file.read_text() + "vllm_derives_head_dim: true\n")
    assert "done again" in run(recipe)
    write_recipe(tmp_path, glm, [DEPTH])
    run(recipe)
    assert json.loads((tmp_path / "out" / "01-depth" / "stage.json").read_text())["key"] == key


def test_a_recipes_family_wins_over_that_of_the_package(make_checkpoint: Callable[..., Path], tmp_path: Path):
    source = make_checkpoint("llama")
    text = (BUILT_IN / "llama.yaml").read_text().replace("  mlp.up_proj: [mlp.down_proj]\n", "")
    write_family(tmp_path, text)
    stages = [{"stage": "quantize", "bits": 8, "group_size": 32}]
    recipe = write_recipe(tmp_path, source, stages, model={"source": str(source), "family": "my_family.yaml"})
    assert_says(refusal("plan", recipe), "does not say in `smoothing`", "mlp.down_proj")


def test_a_checkpoint_is_evaluated_with_the_family_given(glm: Path, tmp_path: Path):
    file = write_family(tmp_path, (BUILT_IN / "glm.yaml").read_text().replace("down: mlp.down_proj", "down: mlp.nose"))
    result = ["--output", tmp_path / "results.json", "--tasks", "perplexity", "--family", file]
    assert_says(refusal("evaluate", glm, *result), "roles.ffn.down", "mlp.nose")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_family_of_another_package_is_found(kind: type, add_family: AddFamily, tmp_path: Path):
    add_family("mine", kind(write_family(tmp_path, llama_as("MineForCausalLM"))))
    assert "MineForCausalLM" in supported_architectures()
    assert family_of({"architectures": ["MineForCausalLM"], "model_type": "llama"}, "x").model_type == "llama"


def test_a_family_of_the_package_is_not_replaced(add_family: AddFamily, tmp_path: Path):
    text = llama_as("LlamaForCausalLM").replace("model_type: llama", "model_type: other")
    add_family("llama", write_family(tmp_path, text))
    assert family_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "x").model_type == "llama"


def test_a_broken_family_of_another_package_is_named_where_it_is_missed(
    add_family: AddFamily, tmp_path: Path, make_checkpoint: Callable[..., Path]
):
    add_family("broken", ImportError("no module named other"))
    add_family("number", 3)
    add_family("wrong", write_family(tmp_path, "architecture: WrongForCausalLM\n"))
    assert len(supported_architectures()) == len([*BUILT_IN.glob("*.yaml")])
    assert invoke("inspect", make_checkpoint("glm")).exit_code == 0
    with pytest.raises(UserError) as raised:
        family_of({"architectures": ["WrongForCausalLM"]}, "config.json")
    message = str(raised.value)
    assert_says(message, "unsupported architecture: WrongForCausalLM", "Supported: ", "Glm4ForCausalLM, ")
    assert_says(message, "'broken' (entry point 'theirs:broken' of the package their-package 2.1): ImportError: no")
    assert_says(message, "'number'", "expected the path of a YAML file, found 3")
    assert_says(message, "'wrong'", str(tmp_path), "model_type: missing")
