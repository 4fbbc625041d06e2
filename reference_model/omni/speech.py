"""Digits spoken by eSpeak NG, which is loaded from the wheel of `espeakng-loader` when data is made, and never shipped.

A voice is one of eSpeak's variants, such as `Annie` or `m3`. Variants that differ in a number alone are one family:
a family is heard in training, or it is tested, and never both.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
from scipy.signal import resample_poly

RATE = 8000
"""Samples per second of every clip."""
SAMPLES = 8000
"""Samples of a clip: one second."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
LEFT_OUT = ("whisper", "whisperf")
"""Variants without a voice."""
WORDS_PER_MINUTE = (130, 220)
PITCH = (25, 75)
SYNCHRONOUS, BY_CHARACTER, UTF8 = 2, 1, 1
SPEED_PARAMETER, PITCH_PARAMETER = 1, 3
LOUDNESS = 0.5
"""The largest sample of every clip."""
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Clip:
    """A spoken digit: samples in int16 from its first sound on, silence after it."""

    digit: int
    voice: str
    samples: np.ndarray
    length: int
    """Samples until its last sound."""


class Speaker:
    """eSpeak NG, of which a process holds one."""

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self._spoken: list[np.ndarray] = []
        self._callback = CALLBACK(self._receive)  # must live as long as the library may call it
        self._rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if self._rate <= 0:
            raise OSError(f"eSpeak NG does not start: code {self._rate}")
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._spoken.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, digit: int, voice: str, accent: str, speed: int, pitch: int) -> Clip:
        """A digit by a voice, at words per minute and a pitch of 0 to 99.

        Raises:
            ValueError: eSpeak does not know the voice or the accent, or says nothing.
        """
        self._spoken.clear()
        if self._library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()):
            raise ValueError(f"eSpeak NG has no voice {accent}+{voice}")
        self._library.espeak_SetParameter(SPEED_PARAMETER, speed, 0)
        self._library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        text = ctypes.create_string_buffer(WORDS[digit].encode())
        self._library.espeak_Synth(text, len(text), 0, BY_CHARACTER, 0, UTF8, None, None)
        self._library.espeak_Synchronize()
        if not self._spoken:
            raise ValueError(f"{accent}+{voice} says nothing")
        sound = resample_poly(np.concatenate(self._spoken).astype(np.float64), RATE, self._rate)
        return Clip(digit, voice, *_trimmed(sound))


def _trimmed(sound: np.ndarray) -> tuple[np.ndarray, int]:
    """A second of a sound from where it begins, in int16, and how many samples it fills of it."""
    size = np.abs(sound)
    loud = np.flatnonzero(size > 0.02 * size.max())
    part = sound[loud[0] : loud[-1] + 1][:SAMPLES] / size.max() * LOUDNESS * 32767
    clip = np.zeros(SAMPLES, dtype=np.int16)
    clip[: len(part)] = np.rint(part)
    return clip, len(part)


def voices(heard: bool) -> list[str]:
    """The voices of training, or those that are tested."""
    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    names = sorted(file.name for file in folder.iterdir() if file.name not in LEFT_OUT)
    return [name for name in names if _is_tested(name) != heard]


def _is_tested(voice: str) -> bool:
    family = voice.rstrip("0123456789").lower()
    return hashlib.sha256(family.encode()).digest()[0] % 5 == 0


def clips(speaker: Speaker, heard: bool, rounds: int, generator: np.random.Generator) -> Iterator[Clip]:
    """Every digit by every voice so many times, each time with another accent, speed and pitch."""
    for _ in range(rounds):
        for voice in voices(heard):
            for digit in range(10):
                accent = ACCENTS[generator.integers(len(ACCENTS))]
                speed, pitch = (int(generator.integers(low, high + 1)) for low, high in (WORDS_PER_MINUTE, PITCH))
                yield speaker.say(digit, voice, accent, speed, pitch)
