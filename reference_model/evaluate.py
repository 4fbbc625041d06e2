"""Measure a checkpoint of the reference model with plain transformers and lm-eval's `HFLM`.

    python reference_model/evaluate.py [reference_model/checkpoint] [--output result.json]

Reports the five-shot quiz accuracy, the held-out perplexity of `python-docs` (windows of 512 and of 256 tokens)
and how far every layer turns its input: one minus the mean cosine between the hidden states before and after it.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from training_data import LETTERS, Subject, read_quiz
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from autoglm_compress.calibration.python_docs import documents

WINDOWS = (512, 256)


def quiz_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, quiz: list[Subject]) -> dict[str, float]:
    """Return the five-shot accuracy by subject, scored as lm-eval's MMLU task does."""
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=2048)
    requests = []
    for subject in quiz:
        for row in subject.test:
            prompt = subject.shots() + row.prompt()
            requests += [Instance("loglikelihood", {}, (prompt, f" {letter}"), i) for i, letter in enumerate(LETTERS)]
    scores = torch.tensor([score for score, _ in judge.loglikelihood(requests, disable_tqdm=True)])
    picks = scores.view(-1, len(LETTERS)).argmax(1).tolist()
    accuracy, at = {}, 0
    for subject in quiz:
        right = sum(LETTERS[pick] == row.letter for pick, row in zip(picks[at:], subject.test, strict=False))
        accuracy[subject.name] = round(right / len(subject.test), 4)
        at += len(subject.test)
    return accuracy


@torch.no_grad()
def held_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[float, list[float]]:
    """Return the held-out perplexity in windows of a length and every layer's influence on the first eight windows."""
    encoded = tokenizer(documents("held-out"), verbose=False)["input_ids"]
    stream = [token for tokens in encoded for token in [*tokens, tokenizer.eos_token_id]]
    windows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    total, influence = 0.0, []
    for batch in windows.split(8):
        result = model(input_ids=batch, use_cache=False, output_hidden_states=not influence)
        if not influence:
            states = [state.float() for state in result.hidden_states]
            influence = [round(1 - F.cosine_similarity(a, b, dim=-1).mean().item(), 5) for a, b in pairwise(states)]
        logits = result.logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (length - 1))), influence


def main() -> None:
    """Evaluate a checkpoint and print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("reference_model/checkpoint"))
    parser.add_argument("--quiz", type=Path, default=Path("calib_data/quiz"), help="folder of the quiz")
    parser.add_argument("--output", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    measured = {length: held_out(model, tokenizer, length) for length in WINDOWS}
    quiz = read_quiz(options.quiz)
    accuracy = quiz_accuracy(model, tokenizer, quiz)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_perplexity": {f"windows of {length}": round(value, 3) for length, (value, _) in measured.items()},
        "quiz_accuracy": round(sum(accuracy.values()) / len(accuracy), 4),
        "quiz_questions": sum(len(subject.test) for subject in quiz),
        "quiz_by_subject": accuracy,
        "layer_influence": measured[WINDOWS[0]][1],
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
