"""Short answers that a model generates, held against the right ones.

Every token would be a walk through the whole model. The model is therefore in memory, as `transformers` has it.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from autoglm_compress.calibration.answers import Exchange, exchanges, require_length
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.options import GenerateOptions, Ignored
from autoglm_compress.forward.one_layer_model import compute_dtype
from autoglm_compress.forward.whole_model import load_generating_model
from autoglm_compress.hashing import hash_of
from autoglm_compress.runtime import Runtime

METRIC = "exact_match"
SPARE = 8
"""How many tokens longer than the longest right answer a generated one may be."""


@dataclass(frozen=True)
class Asked:
    """Rows to generate answers for, and the most tokens of an answer."""

    rows: Sequence[Exchange]
    max_new_tokens: int
    ignore: tuple[Ignored, ...]

    @property
    def key(self) -> str:
        """A hash of all that the model is shown and may write, of the right answers, and of how they are compared."""
        shown = [[row.prompt.content, row.answer] for row in self.rows]
        return hash_of(json.dumps([shown, self.max_new_tokens, sorted(self.ignore)], ensure_ascii=False))


def asked_rows(path: Path, options: GenerateOptions, reader: Reader, longest: int | None) -> Asked:
    """The rows of a file that are asked.

    Args:
        path: the file.
        options: which rows, and how long an answer may be.
        reader: what reads chats for the model.
        longest: the most tokens that the model reads; None if there is no limit.

    Raises:
        UserError: a row has no answer, cannot be read, or is too long.
    """
    rows = list(exchanges(path))
    if not rows:
        raise UserError(f"{path}: no rows. Give chats whose last message is the right answer.")
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    rows = [rows[number] for number in sorted(order[: options.limit])]
    most = options.max_new_tokens or SPARE + max(len(reader.answer_ids(row.answer)) for row in rows)
    for row in rows:
        require_length(row.prompt, len(reader.ids(row.prompt)) + most, longest)
    return Asked(rows, most, options.ignore)


def generate(
    checkpoint: Checkpoint, reader: Reader, asked: Asked, runtime: Runtime, work: Path | None
) -> dict[str, Any]:
    """The share of right answers, generated greedily with the settings beside the checkpoint.

    Args:
        checkpoint: the model.
        reader: what reads chats for it.
        asked: the rows.
        runtime: where the model runs.
        work: a folder that keeps answers, so that a killed evaluation goes on; None for no folder.

    Returns:
        `exact_match` with `exact_match_stderr`, None for a single row, and `records` as of a task of lm-eval. Beside
        them is `answers`: of each row `where`, `question`, `expected`, `answer` and `right`.
    """
    answers = _answers(checkpoint, reader, asked, runtime, work)
    records: list[dict[str, Any]] = [
        {
            "where": row.prompt.where,
            "question": row.question,
            "expected": row.answer,
            "answer": answer,
            "right": is_right(answer, row.answer, asked.ignore),
        }
        for row, answer in zip(asked.rows, answers, strict=True)
    ]
    values = [float(record["right"]) for record in records]
    return {
        METRIC: fmean(values),
        f"{METRIC}_stderr": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        "records": {
            "documents": asked.key,
            "higher_is_better": {METRIC: True},
            "values": {METRIC: values},
            "max_new_tokens": asked.max_new_tokens,
            "answers": records,
        },
    }


def is_right(answer: str, expected: str, ignore: Sequence[Ignored] = ()) -> bool:
    """Whether an answer is the expected one."""
    return _compared(answer, ignore) == _compared(expected, ignore)


def _compared(text: str, ignore: Sequence[Ignored]) -> str:
    text = "".join(text.split()) if "space" in ignore else text.strip()
    return text.casefold() if "case" in ignore else text


def _answers(checkpoint: Checkpoint, reader: Reader, asked: Asked, runtime: Runtime, work: Path | None) -> list[str]:
    """An answer for each row; those of a killed evaluation are taken over."""
    file = None if work is None else work / f"generated-{asked.key}.json"
    found: list[str] = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else []
    if len(found) == len(asked.rows):
        return found
    model = load_generating_model(checkpoint, runtime.device, compute_dtype(checkpoint, runtime.device))
    total = len(asked.rows)
    with runtime.progress.task("generate", total=total, unit="answers", reached=len(found)) as advance:
        for row in asked.rows[len(found) :]:
            found.append(_answer(model, reader, row, asked.max_new_tokens))
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, found)
            advance(1)
    return found


@torch.no_grad()
def _answer(model: Any, reader: Reader, row: Exchange, max_new_tokens: int) -> str:
    if reader.media is not None and row.prompt.media:
        inputs = reader.media.inputs_of(row.prompt)
    else:
        tokens = torch.tensor([reader.ids(row.prompt)])
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None  # which the row before has left, and a row of text would take
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    given = inputs["input_ids"].shape[1]
    made = model.generate(**on_device, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return reader.tokenizer.decode(made[0, given:], skip_special_tokens=True).strip()
