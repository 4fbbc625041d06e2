"""Tiny random models of every family."""

import torch
from transformers import AutoModelForCausalLM

# Every family with the features that set it apart: sliding windows, biases, q/k norms, fused gates, sandwich norms.
FAMILIES: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
}
TEXT = "Return the number of items in a container. Raises TypeError where an object has no len(), or 数.\n"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def build_model(family: str, **changes: object) -> torch.nn.Module:
    """A random model in bf16 whose norms, biases and weights are far from their initial values."""
    from transformers import AutoConfig

    settings = SHAPE | FAMILIES[family] | {"tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **(settings | {"initializer_range": 0.1, "dtype": "bfloat16"} | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def silence_channels(model: torch.nn.Module, first: int) -> None:
    """Leave nothing in the residual stream's channels from `first` on."""
    for name, tensor in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            tensor[:, first:] = 0
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            tensor[first:] = 0
