"""`inspect` on an architecture of no family: how far names and sizes fill a family's YAML."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from autoglm_compress.architecture import Family
from autoglm_compress.architecture.family_draft import FamilyDraft, KnownModel, draft_family
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.unknown_model import known_model
from autoglm_compress.errors import UserError
from support.command_line import assert_says, refusal
from support.models import FAMILIES

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drafted_of_a_known_family_is_right(family: str, make_checkpoint: Callable[..., Path]):
    folder = make_checkpoint(family)
    known, draft = Checkpoint(folder).family, draft_family(known_model(folder))
    assert draft.missing == []
    assert [draft.fields[name] for name in ("architecture", "model_type")] == [known.architecture, known.model_type]
    assert (draft.fields["prefix"], draft.fields["auto_class"]) == ("model.", "AutoModelForCausalLM")
    assert (draft.fields["config"], draft.fields.get("kept")) == ("root", None)
    drafted = draft.fields["layer_tensors"]
    stored = Checkpoint(folder).shape.layer_tensors(0)
    assert drafted == {name: list(known.layer_tensors[name].axes) for name in stored}
    assert Family.model_validate(draft.fields | {"smoothing": {}}).roles == known.roles


def test_inspect_says_what_could_be_filled_and_what_not(tmp_path: Path):
    config = AutoConfig.for_model("phi3", **SIZES)
    message = refusal("inspect", saved(AutoModelForCausalLM.from_config(config), tmp_path))
    assert_says(message, "unsupported architecture: Phi3ForCausalLM", "Supported: ", "Glm4ForCausalLM, ")
    assert_says(message, "roles.attention.query: not one self_attn.q_proj with [query, hidden]")
    assert_says(message, "layer_tensors.self_attn.qkv_proj.weight: [128, 64]", "smoothing:")
    text = message.partition("could be filled:\n")[2].partition("Not filled:")[0]
    filled = yaml.safe_load(text)
    assert filled["roles"]["ffn"] == {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
    assert filled["layer_tensors"]["mlp.gate_up_proj.weight"] == ["gate_up", "hidden"]


def test_a_model_with_a_tower(tmp_path: Path):
    text = SIZES | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=VISION)
    draft = draft_family(known_model(saved(AutoModelForImageTextToText.from_config(config), tmp_path)))
    assert draft.missing == []
    assert draft.fields["auto_class"] == "AutoModelForImageTextToText"
    assert (draft.fields["prefix"], draft.fields["config"]) == ("model.", "text_config")
    assert draft.fields["kept"] == {"visual": "visual."}
    assert draft.fields["layer_tensors"]["self_attn.q_proj.bias"] == ["query"]


def test_a_model_that_transformers_does_not_know(make_checkpoint: Callable[..., Path], tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": ["NewForCausalLM"], "model_type": "newest"}')
    message = refusal("inspect", tmp_path)
    assert_says(message, "NewForCausalLM", "No family's YAML can be drafted", "transformers cannot read it", "newest")


def test_a_config_without_the_sizes(tmp_path: Path):
    config = AutoConfig.for_model("bloom", hidden_size=64, n_head=4, n_layer=2, vocab_size=300)
    message = refusal("inspect", saved(AutoModelForCausalLM.from_config(config), tmp_path))
    assert_says(message, "BloomForCausalLM", "transformers finds no intermediate_size")


def known(**changes: object) -> KnownModel:
    sizes = {"vocab": 9, "hidden": 4, "query": 6, "key_value": 2, "head_dim": 2, "intermediate": 5, "gate_up": 10}
    tensors = {f"model.layers.{layer}.{name}.weight": (4,) for layer in range(2) for name in ("a_norm", "b.c_norm")}
    return replace(KnownModel("A", "a", None, "root", 2, sizes, tensors), **changes)


def test_layers_that_differ_and_names_of_nothing():
    draft = draft_family(known(tensors=known().tensors | {"model.layers.1.moe.router.weight": (3, 4)}))
    assert draft.fields["layer_tensors"] == {"a_norm.weight": ["hidden"], "b.c_norm.weight": ["hidden"]}
    assert_says(str(draft), "auto_class", "layer_kinds, kinds: layer 1 has other tensors", "roles.ffn.gate")
    assert "auto_class" not in draft.fields


def test_no_layers_that_fit():
    draft = draft_family(known(layers=3))
    assert "prefix" not in draft.fields
    assert_says(str(draft), "prefix: no tensors named PREFIX.layers.0 to 2")
    assert isinstance(draft, FamilyDraft)


def test_a_drafted_family_opens_its_model(tmp_path: Path):
    """With the tower whose tensors transformers names otherwise than the file, and which is not unknown."""
    text = SIZES | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=VISION)
    folder = saved(AutoModelForImageTextToText.from_config(config), tmp_path)
    drafted = draft_family(known_model(folder)).fields | {"smoothing": {}}
    assert Checkpoint(folder, Family.model_validate(drafted)).left_out == ()
    drafted.pop("kept")
    with pytest.raises(UserError, match=r"transformers would load .* visual\.blocks\.0\..* more\. Check"):
        Checkpoint(folder, Family.model_validate(drafted))
