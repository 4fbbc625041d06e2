"""Which family a config.json means."""

import pytest

from autoglm_compress.architecture import UnsupportedArchitectureError, family_of
from autoglm_compress.errors import UserError
from support.command_line import assert_says


def test_architecture_and_model_type_name_one_family():
    family = family_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "config.json")
    assert (family.architecture, family.model_type) == ("LlamaForCausalLM", "llama")


@pytest.mark.parametrize("model_type", ["qwen3", "bloom", None])
def test_a_model_type_of_another_family_is_refused(model_type: str | None):
    """transformers builds Qwen3 from it, whose q/k norms a Llama does not have."""
    with pytest.raises(UserError) as refused:
        family_of({"architectures": ["LlamaForCausalLM"], "model_type": model_type}, "here/config.json")
    assert not isinstance(refused.value, UnsupportedArchitectureError)
    assert_says(str(refused.value), "here/config.json", "architectures", "LlamaForCausalLM", "llama", repr(model_type))


def test_an_architecture_of_no_family_is_unsupported():
    with pytest.raises(UnsupportedArchitectureError, match="BloomForCausalLM"):
        family_of({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "config.json")
