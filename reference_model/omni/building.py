"""What stands before training: the tokenizer with its chat template, the processor, and a model of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    WhisperFeatureExtractor,
)

from reference_model.omni.questions import all_words
from reference_model.omni.speech import RATE

LAYERS = 10
"""Text layers of the finished model."""
WIDTH = 96
SPREAD = 0.07
"""Standard deviation of the first weights; transformers' 0.02 is for wide models."""
IMAGE_TOKENS, SOUND_TOKENS = 4, 16
PATCHES = 16
FRAMES = 64
TURN_END, TEXT_END = "<|end|>", "<|endoftext|>"
SPECIAL = {
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "video_token": "<|video|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image|><|vision_end|>"
    "{% elif part['type'] == 'audio' %}<|audio_start|><|audio|><|audio_end|>{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens are the words of the questions; every answer is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=[TEXT_END, TURN_END, *ROLES, *SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_words(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TEXT_END,
        pad_token=TEXT_END,
        extra_special_tokens=SPECIAL,
        chat_template=TEMPLATE,
        model_max_length=2048,
        padding_side="left",
    )


def make_image_processor() -> Qwen2VLImageProcessor:
    """Reads 8 x 8 pixels as 16 patches, which become 4 tokens."""
    return Qwen2VLImageProcessor(
        patch_size=2,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": 64, "longest_edge": 1024},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def make_feature_extractor() -> WhisperFeatureExtractor:
    """Reads a second of sound as 64 frames of 32 mel bins, which become 16 tokens."""
    return WhisperFeatureExtractor(feature_size=32, sampling_rate=RATE, hop_length=125, n_fft=400, chunk_length=1)


def make_config(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen2_5OmniThinkerConfig:
    """The model's configuration at some depth. Both towers hand over 192 features for a token of text."""
    token = tokenizer.convert_tokens_to_ids
    end = token(TEXT_END)
    return Qwen2_5OmniThinkerConfig(
        architectures=["Qwen2_5OmniThinkerForConditionalGeneration"],
        text_config={
            "vocab_size": -len(tokenizer) // 32 * -32,
            "hidden_size": WIDTH,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "initializer_range": SPREAD,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": False,
            "pad_token_id": end,
            "eos_token_id": end,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 128,
            "num_heads": 3,
            "in_channels": 3,
            "initializer_range": SPREAD,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "window_size": 8,
            "fullatt_block_indexes": [0, 1, 2],
            "out_hidden_size": WIDTH,
        },
        audio_config={
            "num_mel_bins": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "d_model": 192,
            "max_source_positions": FRAMES // 2,
            "n_window": FRAMES // 2,
            "output_dim": WIDTH,
            "initializer_range": SPREAD,
        },
        image_token_index=token(SPECIAL["image_token"]),
        audio_token_index=token(SPECIAL["audio_token"]),
        video_token_index=token(SPECIAL["video_token"]),
        audio_start_token_id=token(SPECIAL["audio_bos_token"]),
        audio_end_token_id=token(SPECIAL["audio_eos_token"]),
        vision_start_token_id=token(SPECIAL["vision_bos_token"]),
        vision_end_token_id=token(SPECIAL["vision_eos_token"]),
        user_token_id=token("<|user|>"),
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A model of some depth with random weights in float32."""
    model = Qwen2_5OmniThinkerForConditionalGeneration(make_config(tokenizer, layers))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # No model of this class uses it; the talker of the whole one does.
    model.model.audio_tower.audio_bos_eos_token.requires_grad_(False)
    return model


def deepened(
    model: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The model with all its layers, each of which does a share of what one layer did before.

    The first layer stays single. Each later one becomes several in a row whose output projections are divided by their
    number: the same change of the residual stream in small steps.
    """
    old = model.config.text_config.num_hidden_layers
    copies, rest = divmod(LAYERS - 1, old - 1)
    if rest:
        raise ValueError(f"{old} layers cannot be split evenly into {LAYERS}")
    deep = make_model(tokenizer, LAYERS)
    state = {}
    for name in deep.state_dict():
        head, _, tail = name.partition("language_model.layers.")
        number, _, part = tail.partition(".")
        layer = int(number) if tail else 0
        before = f"{head}language_model.layers.{-(-layer // copies)}.{part}" if tail else name
        shrink = copies if layer and part in ("self_attn.o_proj.weight", "mlp.down_proj.weight") else 1
        state[name] = model.state_dict()[before] / shrink
    deep.load_state_dict(state)
    return deep


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint in bfloat16 for plain `from_pretrained`, with tokenizer and processor."""
    plain = make_model(tokenizer, model.config.text_config.num_hidden_layers)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    both = make_image_processor().to_dict() | make_feature_extractor().to_dict()
    both["processor_class"] = "Qwen2_5OmniProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(both, indent=2, sort_keys=True) + "\n")
