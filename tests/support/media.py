"""Tiny multimodal models with processors of their own, and rows of chats with images and sounds."""

import csv
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from support.multimodal import FAMILIES, SOUND, save

VOCABULARY = 520
SPECIAL = {
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "video_token": "<|video|>",
    "vision_bos_token": "<|seen|>",
    "vision_eos_token": "<|/seen|>",
    "audio_bos_token": "<|heard|>",
    "audio_eos_token": "<|/heard|>",
}
IDS = {name: 512 + number for number, name in enumerate(SPECIAL)}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% elif p['type'] == 'image' %}<|seen|><|image|><|/seen|>"
    "{% elif p['type'] == 'audio' %}<|heard|><|audio|><|/heard|>{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FIELDS: dict[str, dict[str, int]] = {
    "glm4v": {"image_token_id": IDS["image_token"]},
    "qwen2_5_vl": {"image_token_id": IDS["image_token"], "vision_start_token_id": IDS["vision_bos_token"]},
    "qwen3vl": {"image_token_id": IDS["image_token"], "vision_start_token_id": IDS["vision_bos_token"]},
    "qwen2_5omnithinker": {
        "image_token_index": IDS["image_token"],
        "image_token_id": IDS["image_token"],
        "audio_token_index": IDS["audio_token"],
        "audio_token_id": IDS["audio_token"],
        "vision_start_token_id": IDS["vision_bos_token"],
        "audio_start_token_id": IDS["audio_bos_token"],
        "audio_end_token_id": IDS["audio_eos_token"],
    },
}
"""What the config of each model says of its tokens."""
PROCESSORS = {
    "glm4v": ("Glm4vProcessor", "Glm4vImageProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor"),
    "qwen3vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor"),
    "qwen2_5omnithinker": ("Qwen2_5OmniProcessor", "Qwen2VLImageProcessor"),
}


def save_with_processor(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A random model of a family with tokenizer, chat template, and what reads images and sounds."""
    settings = FAMILIES[name].settings
    text = settings["text_config"] | {"vocab_size": VOCABULARY}
    special = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
        extra_special_tokens=SPECIAL,
        chat_template=TEMPLATE,
    )
    assert {kind: special.convert_tokens_to_ids(token) for kind, token in SPECIAL.items()} == IDS
    save(name, folder, special, text_config=text, **FIELDS[name], **changes)
    kind, image = PROCESSORS[name]
    processor: dict[str, Any] = getattr(transformers, image)(
        patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16, "longest_edge": 1024}
    ).to_dict()
    if "audio_config" in settings:
        processor |= transformers.WhisperFeatureExtractor(
            feature_size=8, sampling_rate=1600, hop_length=100, n_fft=200, chunk_length=1
        ).to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"processor_class": kind}))
    return folder


def save_omni(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model that sees and hears, whose towers' last linears have equal sizes, 64 x 128."""
    audio = SOUND | {"output_dim": 64, "n_window": 8, "d_model": 128}
    return save_with_processor("qwen2_5omnithinker", folder, tokenizer, audio_config=audio)


def draw(file: Path, seed: int, size: tuple[int, int] = (8, 8)) -> Path:
    """A random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def record(file: Path, seed: int, samples: int = 1600, rate: int = 1600) -> Path:
    """A random sound of so many samples at a rate in Hz; models take 1600."""
    sound = np.random.default_rng(seed).integers(-9000, 9000, samples, dtype=np.int16)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(sound.tobytes())
    return file


def row(*parts: dict[str, str] | str, answer: str = "It is one of ten.") -> dict[str, Any]:
    """A question of such parts and its answer; a string is text."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_rows(folder: Path, count: int, sounds: bool = False) -> Path:
    """Rows with an image each, and every second with a sound in its place if asked for, with their files."""
    rows = []
    for number in range(count):
        if sounds and number % 2:
            part = {"type": "audio", "path": record(folder / f"{number}.wav", number).name}
        else:
            part = {"type": "image", "path": draw(folder / f"{number}.png", number, (8, 8 + 4 * (number % 3))).name}
        rows.append(row(f"What is number {number}? ", part, " Say it."))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def write_media_quiz(folder: Path, sounds: bool = False) -> Path:
    """A quiz of a subject: an example and five questions, with an image each, a sound of another rate, or neither."""
    for split, count in (("dev", 1), ("test", 5)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / f"shapes_{split}.csv").open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["question", "A", "B", "C", "D", "answer", "image", "audio"])
            for number in range(count):
                image = sound = ""
                if sounds and number == 1:
                    sound = record(folder / split / f"{number}.wav", number, samples=800, rate=800).name
                elif number < 4:
                    image = draw(folder / split / f"{number}.png", number, (8, 8 + 4 * (number % 3))).name
                rows.writerow(
                    [f"What is {number}?", "a square", "red", "a dog, or two", "4", "ABCD"[number % 4], image, sound]
                )
    return folder
