"""Write rows of chats with pictures and sounds, as calibration, healing and evaluation read them, and their files.

    python -m reference_model.omni.write_rows FOLDER --split test --rows 1200
    python -m reference_model.omni.write_rows reference_model/omni/data --split calibration --rows 40 --files 60
    python -m reference_model.omni.write_rows reference_model/omni/data --split test --rows 34 --files 40

`FOLDER/SPLIT.jsonl` holds rows with files, `FOLDER/SPLIT-text.jsonl` rows of text alone. Calibration takes the images
and voices of training; the test takes images and voices that training never met.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from reference_model.omni.digits import pictures
from reference_model.omni.questions import ask
from reference_model.omni.speech import RATE, SAMPLES, Clip, Speaker, clips, voices

KINDS = {"calibration": ("image", "audio", "both", "image_more", "audio_more"), "test": ("image", "audio", "both")}
"""What the rows with files ask, by split."""
SEEDS = {"calibration": 1, "test": 2}
File = tuple[str, int]
"""A file's name relative to the rows, and the digit in it."""


def write_images(folder: Path, split: str, count: int) -> list[File]:
    """Write so many images of a split, or all if there are fewer."""
    images, digits = pictures(split == "calibration")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    written = []
    for number, (image, digit) in enumerate(zip(images[:count], digits.tolist(), strict=False)):
        name = f"images/{split}-{number}.png"
        Image.fromarray(image.numpy()).save(folder / name, optimize=True)
        written.append((name, digit))
    return written


def write_sounds(folder: Path, split: str, count: int, generator: np.random.Generator) -> list[File]:
    """Write so many clips of a split's voices, every digit as often, each beginning somewhere in its second."""
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    heard = split == "calibration"
    rounds = -(-count // (10 * len(voices(heard))))
    every = list(clips(Speaker(), heard, rounds, generator))
    generator.shuffle(every)  # type: ignore[arg-type]
    written = []
    for number, clip in enumerate(_by_turns(every, count)):
        name = f"sounds/{split}-{number}.flac"
        start = int(generator.integers(SAMPLES - clip.length + 1))
        soundfile.write(folder / name, np.roll(clip.samples, start), RATE, subtype="PCM_16")
        written.append((name, clip.digit))
    return written


def _by_turns(every: list[Clip], count: int) -> list[Clip]:
    """So many clips, the digits in turn."""
    by_digit = [iter([clip for clip in every if clip.digit == digit]) for digit in range(10)]
    return [next(each) for each in islice(cycle(by_digit), count)]


def write_rows(folder: Path, split: str, rows: int, files: int) -> None:
    """Write so many rows of each kind over at most so many images and sounds."""
    generator = np.random.default_rng(SEEDS[split])
    images = write_images(folder, split, files)
    sounds = write_sounds(folder, split, files, generator)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as out:
        for kind in KINDS[split]:
            shown, spoken = _drawn(images, rows, generator), _drawn(sounds, rows, generator)
            for (image, seen), (sound, said) in zip(shown, spoken, strict=True):
                messages = ask(kind, seen, said, generator).messages(image, sound)
                out.write(json.dumps({"messages": messages}) + "\n")
    with (folder / f"{split}-text.jsonl").open("w", encoding="utf-8") as out:
        for _ in range(rows * len(KINDS[split])):
            out.write(json.dumps({"messages": ask("text", 0, 0, generator).messages()}) + "\n")


def _drawn(files: list[File], count: int, generator: np.random.Generator) -> list[File]:
    """So many of the files in random order: each as often as the others, or once more."""
    order = [generator.permutation(len(files)) for _ in range(-(-count // len(files)))]
    return [files[number] for number in np.concatenate(order)[:count]]


def main() -> None:
    """Read the options and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=sorted(KINDS), default="test")
    parser.add_argument("--rows", type=int, default=1200, help="of each kind")
    parser.add_argument("--files", type=int, default=1200, help="images at most, and sounds")
    options = parser.parse_args()
    write_rows(options.folder, options.split, options.rows, options.files)


if __name__ == "__main__":
    main()
