"""Recipes as a user writes them: what is understood, and what is refused, with the line and the nearest spelling."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoglm_compress.recipe import load_recipe
from support.command_line import assert_says, refusal, shapes
from support.places import QWEN, RECIPES
from support.running import invoke

HEAD = f"""\
name: tiny
model: {{source: {QWEN}}}
stages:
"""  # the first stage stands in line 4
VALID = f"""\
name: tiny
model: {{source: {QWEN}}}
calibration: {{source: python-docs, samples: 2, sequence_length: 32, seed: 0}}
evaluation: {{perplexity: {{samples: 2}}}}
stages:
  - {{stage: depth, num_hidden_layers: 0.5x}}
  - {{stage: heads, num_attention_heads: 24}}
  - {{stage: ffn, intermediate_size: 9216, method: magnitude}}
  - {{stage: tie}}
  - {{stage: quantize, name: int8, bits: 8}}
  - {{stage: quantize, name: int4, from: tie, bits: 4, group_size: 32}}
"""
Write = Callable[..., Path]
few = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "recipe.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return write


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "valid.yaml"
    file.write_text(VALID)
    return file


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_recipe_is_valid_and_named_after_its_file(file: Path):
    assert load_recipe(file).name == file.stem


def test_every_problem_is_said_at_once_with_line_field_and_nearest_spelling(write: Write):
    file = write(
        """\
name: my recipe
model: {sources: here}
calibration:
  samples: many
  sequence_lenght: 32
evaluation: {mmlu: {num_fewshot: -1}}
stages:
  - {stage: depth, num_hidden_layer: 2}
  - {stage: dept, num_hidden_layers: 2}
  - {stage: quantize, bits: 3, from: hedas}
  - stage: width
    hidden_size: 64.5
    method: activaton
  - {name: nothing}
  - tie
  - {stage: heads, num_attention_heads: 4, from: dpeth}
  - {stage: quantize, name: dept, bits: 4}
"""
    )
    message = refusal("plan", file)
    expected = [
        ("line 1: name: ", "my recipe"),
        ("line 2: model.sources: ", "unknown key: did you mean source?"),
        ("line 2: model.source: ", "missing"),
        ("line 4: calibration.samples: ", "'many'", "whole number"),
        ("line 5: calibration.sequence_lenght: ", "did you mean sequence_length?"),
        ("line 6: evaluation.mmlu.num_fewshot: ", "-1", "greater than or equal to 0"),
        ("line 8: stages.1.num_hidden_layer: ", "did you mean num_hidden_layers?", "layers", "method"),
        ("line 9: stages.2.stage: ", "unknown stage 'dept'", "did you mean depth?", "quantize", "width"),
        ("line 10: stages.3.bits: ", "given 3", "4, 8 or 'auto'"),
        ("line 12: stages.4.hidden_size: ", "64.5", "a ratio up to 1 such as 0.75x"),
        ("line 13: stages.4.method: ", "'activaton'", "did you mean activation?", "magnitude"),
        ("line 14: stages.5: ", "missing stage", "depth", "quantize"),
        ("line 15: stages.6: ", "'tie'", "expected a mapping"),
        ("line 16: stages.7.from: ", "'dpeth'", "did you mean depth?"),
        ("line 17: stages.8: ", "a second stage is called 'dept'", "stage 2"),
    ]
    lines = message.splitlines()
    assert_says(lines[0], "recipe.yaml", "problems")
    for place, *words in expected:
        [line] = [line for line in lines if line.strip().startswith(place)] or [f"no line with {place} in {message}"]
        assert_says(line, *words)
    numbers = [int(line.split("line ")[1].partition(":")[0]) for line in lines[1:]]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        pytest.param("  []", ["line 3: stages", "at least one"], id="no stages"),
        pytest.param("  {stage: tie}", ["stages", "expected a list"], id="stages is a mapping"),
        pytest.param("  - {stage: [tie]}", ["line 4: stages.1.stage", "unknown stage ['tie']"], id="stage is a list"),
        pytest.param("  - {stage: depth, layers: []}", ["line 4: stages.1.layers", "at least one"], id="no layers"),
        pytest.param("  - {stage: depth, layers: [1, b]}", ["line 4: stages.1.layers[1]", "'b'"], id="layer is text"),
        pytest.param(
            "  - {stage: depth, layers: [1], num_hidden_layers: 1}", ["line 4: stages.1", "either"], id="two ways"
        ),
        pytest.param("  - {stage: heads}", ["line 4: stages.1.num_attention_heads: missing"], id="missing option"),
        pytest.param(
            "  - {stage: width, hidden_size: 75%}", ["line 4: stages.1.hidden_size: given '75%'", "0.75x"], id="percent"
        ),
        pytest.param(
            "  - {stage: width, hidden_size: 1.5x}", ["line 4: stages.1.hidden_size", "ratio up to 1"], id="enlarged"
        ),
        pytest.param(
            "  - {stage: quantize, bits: 4, group_size: 100}",
            ["line 4: stages.1.group_size: given 100", "32, 64, 128 or -1"],
            id="group size",
        ),
        pytest.param(
            "  - {stage: tie, output_weight: .inf}", ["line 4: stages.1.output_weight", "finite"], id="infinite weight"
        ),
        pytest.param(
            "  - {stage: tie, name: ../tie}", ["line 4: stages.1.name: given '../tie'", "letters"], id="name is a path"
        ),
        pytest.param("  - {stage: tie}\n  - {stage: tie}", ["line 5: stages.2", "'tie'", "stage 1"], id="same stage"),
        pytest.param(
            "  - {stage: evaluate}\n  - {stage: evaluate}", ["line 5: stages.2", "'evaluate'", "name:"], id="evaluate"
        ),
        pytest.param(
            "  - {stage: tie, from: depth}", ["line 4: stages.1.from", "'depth'", "Allowed: source"], id="from none"
        ),
        pytest.param(
            "  - {stage: depth, layers: [1]}\n  - {stage: tie, from: tie}",
            ["line 5: stages.2.from", "'tie'", "Allowed: depth, source"],
            id="from itself",
        ),
        pytest.param(
            "  - {stage: depth, layers: [1]}\n  - {stage: evaluate}\n  - {stage: tie, from: evaluate}",
            ["line 6: stages.3.from", "makes a checkpoint 'evaluate'", "Allowed: depth, source"],
            id="from what makes no checkpoint",
        ),
        pytest.param(
            "  - {stage: quantize, bits: 4}\n  - {stage: ffn, intermediate_size: 0.5x}",
            ["line 5: stages.2", "ffn cannot take the quantized checkpoint of 'quantize'", "move it before"],
            id="quantize before prune",
        ),
        pytest.param(
            "  - {stage: quantize, bits: 8}\n  - {stage: quantize, name: again, bits: 4}",
            ["line 5: stages.2", "quantized checkpoint of 'quantize'", "from:"],
            id="quantize twice",
        ),
    ],
)
def test_stages_that_cannot_be(write: Write, stages: str, words: list[str]):
    assert_says(refusal("plan", write(HEAD + stages)), "recipe.yaml: 1 problem:", *words)


def test_an_evaluation_task_that_does_not_exist(write: Write, monkeypatch: pytest.MonkeyPatch):
    known = SimpleNamespace(task_index={"arc_easy": SimpleNamespace(cfg={})})  # lm-eval takes seconds to list its own
    monkeypatch.setattr(import_module("autoglm_compress.evaluation.evaluate"), "_task_manager", lambda: known)
    file = write(HEAD + "  - {stage: evaluate, tasks: [perplexity, arc_esy]}\nevaluation: {every_stage: [mmul]}\n")
    message = refusal("plan", file)
    assert_says(message, "line 4: stages.1.tasks: ", "'arc_esy'", "arc_easy")
    assert_says(message, "line 5: evaluation.every_stage: ", "'mmul'", "mmlu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", ["expected a mapping", "found nothing"], id="empty"),
        pytest.param("- {stage: tie}", ["expected a mapping", "found a list"], id="list"),
        pytest.param("name: tiny", ["2 problems", "model: missing", "stages: missing"], id="no model"),
        pytest.param("name: tiny\nstages: [}\nmodel: x\n", ["line 2: not valid YAML"], id="open bracket"),
        pytest.param("name: tiny\n\tmodel: x\n", ["line 2: not valid YAML", "'\\t'"], id="tab"),
        pytest.param("name: a\nmodel: {source: b, source: c}", ["line 2", "source is given twice"], id="twice"),
        pytest.param("name: a\non: b", ["line 2", "a key must be text"], id="key is a boolean"),
        pytest.param("name: &a [*a]", ["not valid YAML"], id="list in itself"),
        pytest.param("name: 2020-99-99", ["not valid YAML", "month"], id="no such day"),
        pytest.param("name: a\x00b", ["not valid YAML", "#x0000"], id="binary"),
    ],
)
def test_files_that_are_no_recipe(write: Write, text: str, words: list[str]):
    assert_says(refusal("plan", write(text)), "recipe.yaml: ", *words)


def test_a_recipe_that_is_not_there(tmp_path: Path):
    assert_says(refusal("run", tmp_path / "none.yaml"), "none.yaml: cannot read it: No such file")
    assert_says(refusal("plan", tmp_path), f"{tmp_path}: cannot read it: Is a directory")


def test_a_base_is_merged_key_by_key_and_lists_are_replaced(write: Write):
    write(VALID + "seed: 7\n", "ground.yaml")
    write("base: ground.yaml\ncalibration: {samples: 5}\n", "middle.yaml")
    recipe = load_recipe(write("base: middle.yaml\nname: top\nstages: [{stage: tie}]\n"))
    assert (recipe.name, recipe.seed, recipe.labels()) == ("top", 7, ["tie"])
    assert (recipe.calibration.samples, recipe.calibration.sequence_length) == (5, 32)


def test_problems_in_a_base_name_its_file(write: Write):
    write(HEAD + "  - {stage: tie, metod: input}\n", "ground.yaml")
    message = refusal("plan", write("base: ground.yaml\nseed: x\n"))
    assert_says(message, "line 2: seed", "ground.yaml line 4: stages.1.metod: unknown key: did you mean method?")


def test_bases_that_cannot_be(write: Write):
    write("base: recipe.yaml\n", "other.yaml")
    assert_says(refusal("plan", write("base: other.yaml\n")), "cannot be its own base", "recipe.yaml -> ", "other.yaml")
    assert_says(refusal("plan", write("base: none.yaml\n")), "recipe.yaml: base: ", "none.yaml: cannot read it")
    assert_says(refusal("plan", write("base: [a]\n")), "recipe.yaml: base: expected the name", "['a']")


def test_ratios_are_of_what_the_stage_is_given(write: Write):
    stages = "  - {stage: ffn, intermediate_size: 0.5x}\n  - {stage: ffn, name: more, intermediate_size: 0.5x}\n"
    assert [shape["intermediate_size"] for shape in shapes(write(HEAD + stages))] == [12288, 6144, 3072]


def test_a_branch_takes_the_checkpoint_that_from_names(valid: Path):
    *_, tied, int8, int4 = shapes(valid)
    assert int8["quantization"]["bits"] == 8
    assert int4["quantization"]["bits"] == 4
    assert int4 | {"quantization": None} == int8 | {"quantization": None} == tied


@pytest.mark.parametrize(
    ("assignment", "stage", "field", "value"),
    [
        ("stages.depth.num_hidden_layers=6", 1, "num_hidden_layers", 6),
        ("stages.1.num_hidden_layers=0.25x", 1, "num_hidden_layers", 9),
        ("stages.heads.num_attention_heads=8", 2, "num_attention_heads", 8),
        ("stages.int4.bits=8", 6, "quantization", {"bits": 8}),
        ("stages=[{stage: width, hidden_size: 3072}]", 1, "hidden_size", 3072),
        (f"model={{source: {QWEN.parent / 'glm-4-9b-0414'}}}", 0, "architecture", "Glm4ForCausalLM"),
    ],
)
def test_set_overrides_a_field(valid: Path, assignment: str, stage: int, field: str, value: object):
    planned = shapes(valid, "--set", assignment)[stage][field]
    assert planned.items() >= value.items() if isinstance(value, dict) else planned == value


def test_set_overrides_come_one_after_the_other(valid: Path):
    recipe = load_recipe(valid, ["evaluation.mmlu.limit=3", "calibration={samples: 9}", "calibration.seed=2", "name=x"])
    assert (recipe.name, recipe.evaluation.mmlu.limit) == ("x", 3)
    assert recipe.calibration.model_dump() == {
        "source": "python-docs",
        "samples": 9,
        "sequence_length": 2048,
        "seed": 2,
    }


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.source", ["expected KEY=VALUE"]),
        ("=3", ["expected KEY=VALUE"]),
        ("model..source=x", ["expected KEY=VALUE"]),
        ("seed=[", ["not valid YAML"]),
        ("seed=2020-99-99", ["not valid YAML"]),
        ("name.first=x", ["name holds a value"]),
        ("stages.width.hidden_size=1", ["no stage 'width'", "depth, heads, ffn, tie, int8, int4"]),
        ("stages.7.bits=4", ["no stage '7'"]),
        ("stages.depth=4", ["stages.depth.OPTION=VALUE"]),
        ("sead=3", ["sead: unknown key", "did you mean seed?"]),
        ("stages.depth.num_layers=3", ["stages.1.num_layers: unknown key", "num_hidden_layers"]),
        ("model={source: 3}", ["model.source: given 3", "expected text"]),
        ("stages.heads.num_attention_heads=2x", ["stages.2.num_attention_heads: given '2x'", "0.75x"]),
    ],
)
def test_overrides_that_cannot_be(valid: Path, assignment: str, words: list[str]):
    key = assignment.partition("=")[0]
    assert_says(refusal("plan", valid, "--set", assignment), f"--set {key}", *words)


def test_a_list_is_overridden_as_a_whole(valid: Path):
    layers = ["--set", "stages.depth={stage: depth}", "--set", "stages.1.layers=[0, 1]", "--set", "stages.1.layers.0=2"]
    assert_says(refusal("plan", valid, *layers[:2]), "stages.depth.OPTION=VALUE")
    whole = ["--set", "stages=[{stage: depth, layers: [0, 1]}]"]
    assert_says(refusal("plan", valid, *whole, "--set", "stages.1.layers.0=2"), "layers is a list", "layers=[0, 1]")
    assert shapes(valid, *whole, "--set", "stages.1.layers=[2]")[1]["num_hidden_layers"] == 1


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "sized.yaml"
    file.write_text(HEAD + "  - {stage: ffn, intermediate_size: 0.5x}\n")
    return file


numbers = st.integers(-10, 20_000) | st.floats(-1, 2) | st.sampled_from(["0.75", "1x", "1.0x", ".5x", "0x", "0.0x"])
ratios = st.floats(0.00001, 1.1).map("{:.5f}x".format)
texts = st.text(st.sampled_from("0123456789.x%-+e_ []{}"), max_size=8)


@few
@given(numbers | ratios | texts)
def test_a_size_is_one_to_the_source_or_refused_by_name(sized: Path, size: object):
    result = invoke("plan", sized, "--json", "--set", f"stages.ffn.intermediate_size={size}")
    if result.exit_code == 2:
        assert_says(result.output, "intermediate_size")
        return
    planned = json.loads(result.output)["checkpoints"][1]["shape"]["intermediate_size"]
    asked = float(size[:-1]) * 12288 if isinstance(size, str) and size.endswith("x") else float(size)
    assert 1 <= planned <= 12288
    assert abs(planned - asked) <= 0.5


paths = st.lists(
    st.sampled_from(["stages", "depth", "int4", "1", "9", "²", "", "model", "source", "calibration", "seed", "layers"]),
    min_size=1,
    max_size=4,
).map(".".join)
values = st.sampled_from(["3", "0.5x", "[0, 1]", "[{}]", "{a: 1}", "{3: 1}", "null", "true", "!!set {a}", "*a", "''"])


@few
@given(paths, values | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6))
@example("stages.1.stage", "[depth]")
@example("stages.1.name", "{a: 1}")
@example("model.source", "no/model")
def test_no_override_ends_in_a_traceback(valid: Path, path: str, value: str):
    assert invoke("plan", valid, "--set", f"{path}={value}").exit_code in (0, 2)


@few
@given(
    st.integers(0, len(VALID)),
    st.integers(0, 12),
    st.text(st.sampled_from("abx019 -:[]{},&*!?|>'\"#%@`\n\t"), max_size=4),
)
def test_no_damage_to_a_recipe_ends_in_a_traceback(valid: Path, at: int, removed: int, added: str):
    damaged = valid.with_name("damaged.yaml")
    damaged.write_text(VALID[:at] + added + VALID[at + removed :])
    assert invoke("plan", damaged).exit_code in (0, 2)
