"""Tiny models of families that this package does not know, and the YAML files with which a user describes them."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

GLM4V = """
architecture: Glm4vForConditionalGeneration
model_type: glm4v
auto_class: AutoModelForImageTextToText
prefix: model.language_model.
config: text_config
kept: {vision: model.visual.}
roles:
  embedding: model.language_model.embed_tokens
  final_norm: model.language_model.norm
  head: lm_head
  attention: {query: self_attn.q_proj, key: self_attn.k_proj, value: self_attn.v_proj, output: self_attn.o_proj}
  ffn: {gate_up: mlp.gate_up_proj, down: mlp.down_proj}
layer_tensors:
  input_layernorm.weight: [hidden]
  self_attn.q_proj.weight: [query, hidden]
  self_attn.q_proj.bias: [query]
  self_attn.k_proj.weight: [key_value, hidden]
  self_attn.k_proj.bias: [key_value]
  self_attn.v_proj.weight: [key_value, hidden]
  self_attn.v_proj.bias: [key_value]
  self_attn.o_proj.weight: [hidden, query]
  post_self_attn_layernorm.weight: [hidden]
  post_attention_layernorm.weight: [hidden]
  mlp.gate_up_proj.weight: [gate_up, hidden]
  mlp.down_proj.weight: [hidden, intermediate]
  post_mlp_layernorm.weight: [hidden]
smoothing:
  input_layernorm: [self_attn.q_proj, self_attn.k_proj, self_attn.v_proj]
  self_attn.v_proj: [self_attn.o_proj]
  post_attention_layernorm: [mlp.gate_up_proj]
  mlp.gate_up_proj: [mlp.down_proj]
writer_norms: {self_attn.o_proj: post_self_attn_layernorm, mlp.down_proj: post_mlp_layernorm}
transformers_derives_head_dim: true
"""
"""A vision tower beside the text tower, whose config is a part of the whole."""

QWEN2VL = """
architecture: Qwen2VLForConditionalGeneration
model_type: qwen2_vl
auto_class: AutoModelForImageTextToText
config: text_config
kept: {vision: visual.}
roles:
  embedding: model.embed_tokens
  final_norm: model.norm
  head: lm_head
  attention: {query: self_attn.q_proj, key: self_attn.k_proj, value: self_attn.v_proj, output: self_attn.o_proj}
  ffn: {gate: mlp.gate_proj, up: mlp.up_proj, down: mlp.down_proj}
layer_tensors:
  input_layernorm.weight: [hidden]
  self_attn.q_proj.weight: [query, hidden]
  self_attn.q_proj.bias: [query]
  self_attn.k_proj.weight: [key_value, hidden]
  self_attn.k_proj.bias: [key_value]
  self_attn.v_proj.weight: [key_value, hidden]
  self_attn.v_proj.bias: [key_value]
  self_attn.o_proj.weight: [hidden, query]
  post_attention_layernorm.weight: [hidden]
  mlp.gate_proj.weight: [intermediate, hidden]
  mlp.up_proj.weight: [intermediate, hidden]
  mlp.down_proj.weight: [hidden, intermediate]
smoothing:
  input_layernorm: [self_attn.q_proj, self_attn.k_proj, self_attn.v_proj]
  self_attn.v_proj: [self_attn.o_proj]
  post_attention_layernorm: [mlp.gate_proj, mlp.up_proj]
  mlp.up_proj: [mlp.down_proj]
transformers_derives_head_dim: true
"""
"""Files whose tensors have other names than the modules of `transformers`."""

LFM2 = """
architecture: Lfm2ForCausalLM
model_type: lfm2
roles:
  embedding: model.embed_tokens
  final_norm: model.embedding_norm
  head: lm_head
  attention: {query: self_attn.q_proj, key: self_attn.k_proj, value: self_attn.v_proj, output: self_attn.out_proj}
  ffn: {gate: feed_forward.w1, up: feed_forward.w3, down: feed_forward.w2}
layer_kinds: layer_types
layer_tensors:
  operator_norm.weight: [hidden]
  conv.in_proj.weight: {axes: [192, hidden], kinds: [conv]}
  conv.conv.weight: {axes: [hidden, 1, 3], kinds: [conv]}
  conv.out_proj.weight: {axes: [hidden, 64], kinds: [conv]}
  self_attn.q_proj.weight: {axes: [query, hidden], kinds: [full_attention]}
  self_attn.k_proj.weight: {axes: [key_value, hidden], kinds: [full_attention]}
  self_attn.v_proj.weight: {axes: [key_value, hidden], kinds: [full_attention]}
  self_attn.q_layernorm.weight: {axes: [head_dim], kinds: [full_attention]}
  self_attn.k_layernorm.weight: {axes: [head_dim], kinds: [full_attention]}
  self_attn.out_proj.weight: {axes: [hidden, query], kinds: [full_attention]}
  ffn_norm.weight: [hidden]
  feed_forward.w1.weight: [intermediate, hidden]
  feed_forward.w3.weight: [intermediate, hidden]
  feed_forward.w2.weight: [hidden, intermediate]
smoothing:
  operator_norm: [conv.in_proj, self_attn.q_proj, self_attn.k_proj, self_attn.v_proj]
  self_attn.v_proj: [self_attn.out_proj]
  ffn_norm: [feed_forward.w1, feed_forward.w3]
  feed_forward.w3: [feed_forward.w2]
"""
"""Layers of two kinds with tensors of their own, and names that no other family has."""

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = SIZES | {"num_hidden_layers": 4, "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "patch_size": 2,
}
"""A vision tower that writes to a residual stream of 64."""
VISION = TOWER | {"image_size": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}


def save_glm4v(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model with a vision tower, in bf16, and the file that says how its images are made."""
    text = COMMON | {"rope_parameters": ROPE, "initializer_range": 0.1}
    config = Glm4vConfig(text_config=text, vision_config=VISION, image_token_id=5, tie_word_embeddings=False)
    torch.manual_seed(0)
    _save(Glm4vForConditionalGeneration(config), folder, tokenizer)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 2}')
    return folder


def save_qwen2vl(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model with a vision tower, in bf16."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = COMMON | {"rope_parameters": rope, "initializer_range": 0.1}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=5, tie_word_embeddings=False)
    torch.manual_seed(0)
    _save(Qwen2VLForConditionalGeneration(config), folder, tokenizer)
    return folder


def save_lfm2(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model in bf16 whose layers are convolutions and attention in turn."""
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    settings = COMMON | {"layer_types": kinds, "block_auto_adjust_ff_dim": False, "initializer_range": 0.1}
    config = AutoConfig.for_model("lfm2", **settings, tie_word_embeddings=False, tie_embedding=False)
    torch.manual_seed(0)
    _save(AutoModelForCausalLM.from_config(config), folder, tokenizer)
    return folder


@torch.no_grad()
def _save(model: torch.nn.Module, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_family(folder: Path, text: str) -> Path:
    """The YAML file, beside the recipe that a test writes into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "my_family.yaml"
    file.write_text(text)
    return file
