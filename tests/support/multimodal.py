"""Tiny random models with towers beside the text, of every such family, and rows with an image or a sound."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from autoglm_compress.architecture import Family
from autoglm_compress.architecture.family_files import built_in
from support.own_families import SIZES, TOWER

MEDIA_TOKEN = 5
SECOND_MEDIA_TOKEN = 6
START_TOKEN = 7
"""Stands before the first kind's tokens; that of the second kind follows."""
END_TOKEN = 9
MEDIA_TOKENS = 4
"""How many tokens the features of the one image, or of the one sound, fill."""
IDS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
TEXT = SIZES | IDS | {"num_hidden_layers": 4, "initializer_range": 0.1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION = TOWER | {"spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.1}
WINDOWED = VISION | {"window_size": 8, "fullatt_block_indexes": [1]}
SOUND = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "max_source_positions": 8,
    "initializer_range": 0.1,
}
ENCODER = {"num_mel_bins": 8, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
ENCODER |= {"num_attention_heads": 2, "initializer_range": 0.1}


@dataclass(frozen=True)
class MultimodalFamily:
    """How a tiny model of a family is built, and what its rows with an image or a sound have beside tokens."""

    architecture: str
    config: str
    settings: dict[str, Any]
    media: tuple[Callable[[torch.Generator], dict[str, torch.Tensor]], ...]


def _image(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sixteen patches of 2 x 2 pixels, three channels and two frames."""
    pixels = torch.randn(16, 2 * 2 * 3 * 2, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _sound(mask: str | None, frames: int) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    def make(generator: torch.Generator) -> dict[str, torch.Tensor]:
        features = {"input_features": torch.randn(1, 8, frames, generator=generator)}
        return features | ({mask: torch.ones(1, frames, dtype=torch.long)} if mask else {})

    return make


GLM_TEXT = TEXT | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}
GLM_VISION = VISION | {"image_size": 8}
FAMILIES = {
    family.config.removesuffix("Config").lower(): family
    for family in (
        MultimodalFamily(
            "Glm4vForConditionalGeneration",
            "Glm4vConfig",
            {"text_config": GLM_TEXT, "vision_config": GLM_VISION, "image_token_id": MEDIA_TOKEN},
            (_image,),
        ),
        MultimodalFamily(
            "Glm46VForConditionalGeneration",
            "Glm46VConfig",
            {
                "text_config": GLM_TEXT | {"model_type": "glm4v_text"},
                "vision_config": GLM_VISION | {"model_type": "glm4v_vision"},
                "image_token_id": MEDIA_TOKEN,
            },
            (_image,),
        ),
        MultimodalFamily(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {
                "text_config": TEXT | {"rope_parameters": ROPE},
                "vision_config": WINDOWED,
                "image_token_id": MEDIA_TOKEN,
            },
            (_image,),
        ),
        MultimodalFamily(
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            {
                "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}, "head_dim": 16},
                "vision_config": VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
                "image_token_id": MEDIA_TOKEN,
            },
            (_image,),
        ),
        MultimodalFamily(
            "Qwen2_5OmniThinkerForConditionalGeneration",
            "Qwen2_5OmniThinkerConfig",
            {
                "text_config": TEXT | {"rope_parameters": ROPE},
                "vision_config": WINDOWED,
                "audio_config": SOUND | {"output_dim": 64, "n_window": 8},
                "image_token_index": MEDIA_TOKEN,
                "audio_token_index": SECOND_MEDIA_TOKEN,
                "vision_start_token_id": START_TOKEN,
                "audio_start_token_id": START_TOKEN + 1,
                "audio_end_token_id": END_TOKEN,
            },
            (_image, _sound("feature_attention_mask", 16)),
        ),
        MultimodalFamily(
            "Qwen2AudioForConditionalGeneration",
            "Qwen2AudioConfig",
            {
                "text_config": TEXT | {"model_type": "qwen2"},
                "audio_config": SOUND | {"model_type": "qwen2_audio_encoder"},
                "audio_token_index": MEDIA_TOKEN,
            },
            (_sound("feature_attention_mask", 16),),
        ),
        MultimodalFamily(
            "GlmAsrForConditionalGeneration",
            "GlmAsrConfig",
            {
                "text_config": TEXT | {"model_type": "llama"},
                "audio_config": ENCODER | {"model_type": "glmasr_encoder"},
                "audio_token_id": MEDIA_TOKEN,
            },
            (_sound("input_features_mask", 32),),
        ),
        MultimodalFamily(
            "VoxtralForConditionalGeneration",
            "VoxtralConfig",
            {
                "text_config": TEXT | {"model_type": "llama", "head_dim": 16},
                "audio_config": ENCODER | {"model_type": "voxtral_encoder", "max_source_positions": 16},
                "audio_token_id": MEDIA_TOKEN,
            },
            (_sound(None, 32),),
        ),
    )
}
"""By short names, such as `glm4v`."""
IDENTITY = {"stage": "depth", "name": "same", "num_hidden_layers": "1x"}
DEPTH = {"stage": "depth", "num_hidden_layers": 3}
FFN = {"stage": "ffn", "intermediate_size": 96}
HEADS = {"stage": "heads", "num_attention_heads": 2}
WIDTH = {"stage": "width", "hidden_size": 32}
TIE = {"stage": "tie"}
REFIT = {"stage": "refit", "layer_passes": 1, "logit_passes": 1}
HEAL = {"stage": "heal", "tokens": 4096, "batch_size": 8, "learning_rate": 0.001, "checks": 2}
EVALUATE = {"stage": "evaluate", "tasks": ["perplexity"]}
INT8 = {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 32, "method": "round_to_nearest"}
INT4 = {"stage": "quantize", "name": "int4", "from": "heal", "bits": 4, "group_size": 32}


def family_of(name: str) -> Family:
    """What the package says of a family."""
    return built_in()[FAMILIES[name].architecture]


def stages_of(name: str) -> list[dict[str, Any]]:
    """All stages that a family can go through, one after the other."""
    family = family_of(name)
    size = [WIDTH | {"num_attention_heads": 2}] if family.transformers_derives_head_dim else [HEADS, WIDTH]
    tie = [TIE] if family.transformers_ties else []
    return [IDENTITY, DEPTH, FFN, *size, *tie, REFIT, HEAL, EVALUATE, INT8, INT4]


def save(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A random model of a family, in bf16, whose norms and biases are far from their initial values."""
    family = FAMILIES[name]
    config, settings = getattr(transformers, family.config), family.settings | changes
    if hasattr(config, "tie_word_embeddings"):  # some cannot be tied, and do not say so
        settings = {"tie_word_embeddings": False} | settings
    torch.manual_seed(0)
    model = getattr(transformers, family.architecture)(config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(checkpoint: Path, dtype: torch.dtype | str = torch.float32) -> torch.nn.Module:
    """A checkpoint in plain transformers, which must find every tensor it looks for and no other."""
    from transformers import AutoModelForMultimodalLM

    model, info = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def text_row() -> dict[str, torch.Tensor]:
    """A row of text."""
    return {"input_ids": (torch.arange(24)[None] * 37) % 500 + 10}


def media_rows(name: str, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """For each kind of media a row of text around it; another seed gives another image or sound."""
    rows = []
    for number, make in enumerate(FAMILIES[name].media):
        media = make(torch.Generator().manual_seed(seed))
        tokens = text_row()["input_ids"].clone()
        tokens[:, 5], tokens[:, 6 + MEDIA_TOKENS] = START_TOKEN + number, END_TOKEN
        tokens[:, 6 : 6 + MEDIA_TOKENS] = MEDIA_TOKEN + number
        row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | media
        if "image_grid_thw" in media:
            row["mm_token_type_ids"] = (tokens == MEDIA_TOKEN).int()
        rows.append(row)
    return rows


@torch.no_grad()
def logits(model: torch.nn.Module, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [1, length, vocab]."""
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None  # which the row before has left
    return model(**row).logits
