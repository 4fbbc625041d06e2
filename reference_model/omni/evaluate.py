"""Measure a checkpoint of the model that sees and hears: the share of right answers, greedy, in plain transformers.

python -m reference_model.omni.write_rows ROWS --split test --rows 1200
python -m reference_model.omni.evaluate reference_model/omni/checkpoint ROWS/test.jsonl [ROWS/test-text.jsonl]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM

from autoglm_compress.checkpoint.processor import load_processor

BATCH = 64
ANSWER_TOKENS = 3


@dataclass(frozen=True)
class Row:
    """A question as the processor takes it, its answer, and which files it has: `image`, `audio`, `both` or `text`."""

    question: list[dict[str, Any]]
    answer: str
    kind: str


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSONL file of chats, whose images and sounds lie beside it."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        *question, answer = json.loads(line)["messages"]
        parts = [part for turn in question for part in turn["content"]]
        media = {part["type"] for part in parts} - {"text"}
        for part in parts:
            if part["type"] != "text":
                part["path"] = str(file.parent / part["path"])
        rows.append(Row(question, answer["content"], "both" if len(media) > 1 else next(iter(media), "text")))
    return rows


@torch.no_grad()
def answers(checkpoint: Path, rows: list[Row]) -> list[str]:
    """What a checkpoint answers to each row."""
    processor = load_processor(checkpoint)
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model(torch.tensor([[0]]))  # unpacks quantized towers, which `generate` would use before it calls the model
    inputs = [
        processor.apply_chat_template(
            row.question, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        for row in rows
    ]
    alike = defaultdict(list)  # what can be stacked without padding
    for number, one in enumerate(inputs):
        alike[tuple(sorted((name, value.shape[1:]) for name, value in one.items()))].append(number)
    given = [""] * len(rows)
    for numbers in alike.values():
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            batch = {name: torch.cat([inputs[number][name] for number in chosen]) for name in inputs[chosen[0]]}
            found = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            texts = processor.tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for number, text in zip(chosen, texts, strict=True):
                given[number] = text
    return given


def accuracy(checkpoint: Path, rows: list[Row]) -> dict[str, float]:
    """The share of right answers by kind of row."""
    right = defaultdict(list)
    for row, answer in zip(rows, answers(checkpoint, rows), strict=True):
        right[row.kind].append(answer == row.answer)
    return {kind: sum(each) / len(each) for kind, each in right.items()}


def main() -> None:
    """Evaluate a checkpoint and print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("rows", type=Path, nargs="+", help="files of rows")
    options = parser.parse_args()
    rows = [row for file in options.rows for row in read_rows(file)]
    found = {kind: round(share, 4) for kind, share in accuracy(options.checkpoint, rows).items()}
    print(json.dumps(found | {"rows": len(rows)}, indent=1))


if __name__ == "__main__":
    main()
