"""What the workers share: the seconds and the memory that one engine takes with one model, and how well it predicts.

A worker is a process with one model: `python benchmarks/engines/run_….py JOB.json RESULT.json`. The job has `model` (a
file or a folder), `threads`, `context` (tokens that there is room for), `prompts` (how many tokens to read at once),
`decode` (how many to make one by one), `repeats`, and `fill`, the tokens of the longest text, for the peak of memory
alone; for quality also `rows`, a file of numpy with token ids
[rows, tokens], and `reference`, a file of numpy with the logits of the 16-bit source [rows, tokens, vocab_size].
"""

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

Job = dict[str, Any]
SHORT = 16
LONG = 15.0
"""Seconds of repeats after which there are enough."""
POSITIONS = 64
"""Whose logits are compared at once, in fp64."""


class Engine(Protocol):
    """A loaded model."""

    def prefill(self, tokens: list[int]) -> float:
        """Seconds from a text to the logits of its last token."""

    def decode(self, prompt: list[int], count: int) -> float:
        """Seconds for a token, of so many made one by one after a prompt."""

    def logits(self, row: list[int]) -> np.ndarray | None:
        """The logits of all tokens of a text [tokens, vocab_size], or None if the engine does not give them."""


def main(load: Callable[[Job], Engine]) -> None:
    """Do the job on the command line with an engine."""
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    before, began = memory("VmRSS"), time.perf_counter()
    engine = load(job)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began, "loaded_rss_bytes": memory("VmRSS")}
    found |= speed(engine, job)
    if job["fill"]:
        engine.prefill([10] * job["fill"])
    # Before the logits of whole texts are in memory.
    found |= {"interpreter_rss_bytes": before, "peak_rss_bytes": memory("VmHWM")}
    if job.get("reference"):
        found |= quality(engine, np.load(job["rows"]), np.load(job["reference"], mmap_mode="r"))
    found["load_average"] = os.getloadavg()[0]
    Path(sys.argv[2]).write_text(json.dumps(found))


def speed(engine: Engine, job: Job) -> dict[str, Any]:
    """Tokens per second, by medians of repeats after a few tokens that do not count."""
    draw = random.Random(0)

    def text(length: int) -> list[int]:
        return [draw.randrange(10, job["vocab_size"] - 10) for _ in range(length)]

    found: dict[str, Any] = {}
    for length in job["prompts"]:
        engine.prefill(text(SHORT))
        prompt = text(length)
        found[f"prefill_{length}"] = length / repeated(lambda tokens=prompt: engine.prefill(tokens), job["repeats"])
    if job["decode"]:
        prompt = text(SHORT)
        found["decode"] = 1 / repeated(lambda: engine.decode(prompt, job["decode"]), job["repeats"])
    return found


def repeated(measure: Callable[[], float], most: int) -> float:
    """The median of so many measurements, or of fewer if they take long."""
    began, found = time.perf_counter(), [measure()]
    while len(found) < most and time.perf_counter() - began < LONG:
        found.append(measure())
    return median(found)


def quality(engine: Engine, rows: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Perplexity, the mean KL divergence from the reference in nats, and how often the likeliest token is the same."""
    divergence = loss = 0.0
    same = 0
    for row, expected in zip(rows, reference, strict=True):
        logits = engine.logits(row.tolist())
        if logits is None:
            return {}
        for start in range(0, len(row), POSITIONS):
            part = slice(start, start + POSITIONS)
            ours, theirs = log_softmax(expected[part]), log_softmax(logits[part])
            divergence += float((np.exp(ours) * (ours - theirs)).sum())
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            following = row[start + 1 : start + 1 + POSITIONS]
            loss -= float(theirs[np.arange(len(following)), following].sum())
    return {
        "kl_divergence": divergence / rows.size,
        "perplexity": math.exp(loss / rows[:, 1:].size),
        "same_next_token": same / rows.size,
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In fp64, over the last dimension."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def memory(field: str) -> int:
    """Bytes of a field in this process's status: VmRSS for what is resident, VmHWM for the most that was.

    Unlike getrusage, the kernel counts it anew for a new program, so nothing of the parent is in it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
