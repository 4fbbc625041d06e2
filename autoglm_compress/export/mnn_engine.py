"""MNN's `llm` engine in a process of its own, run as a module: what breaks it takes no other process along.

A job comes as JSON on the standard input, with the model's folder. `{"folder", "texts"}` answers the token ids of
texts, as JSON on the standard output, and `{"folder", "chat"}` the prompt that a chat becomes; both give a folder
without a graph one that computes nothing. `{"folder", "rows", "continuation", "logits", "threads"}` writes the logits
of rows of token ids and of what the model continues them with greedily, fp32 [rows, tokens + continuation,
vocab_size], to a file of numpy. It answers `{"continuations"}`, and as `low_memory_kl_divergence` the mean KL
divergence from there to the mode that rounds activations to 8 bits.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from autoglm_compress.export.mnn_names import GRAPH, SETTINGS, WEIGHTS


class Engine:
    """A loaded model.

    Raises:
        RuntimeError: the engine does not load it.
    """

    def __init__(self, folder: Path, memory: str, threads: int) -> None:
        import MNN.llm

        self._model = MNN.llm.create(str(folder / SETTINGS))
        options = {"all_logits": True, "memory": memory, "precision": "high", "thread_num": threads, "use_mmap": False}
        self._model.set_config(options)
        self._model.load()

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text, in which special tokens are found."""
        return [int(token) for token in self._model.tokenizer_encode(text)]

    def prompt(self, chat: list[dict[str, str]]) -> str:
        """What the chat template makes of messages."""
        return str(self._model.apply_chat_template(chat))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits of tokens after those that it has read, fp32 [tokens, vocab_size]."""
        found = self._model.forward(tokens)
        if found is None:
            raise RuntimeError("error: MNN computes nothing with the file")
        return np.array(found.read(), dtype=np.float32).reshape(len(tokens), -1)

    def forget(self) -> None:
        """Have read nothing."""
        self._model.reset()


def predict(job: dict[str, Any]) -> dict[str, Any]:
    """Write the logits of rows; see above."""
    rows, continuation = job["rows"], job["continuation"]
    exact, continued = Engine(Path(job["folder"]), "high", job["threads"]), []
    size = (len(rows), len(rows[0]) + continuation, exact.logits(rows[0][:1]).shape[1])
    out = np.lib.format.open_memmap(job["logits"], mode="w+", dtype=np.float32, shape=size)
    for number, row in enumerate(rows):
        exact.forget()
        out[number, : len(row)] = exact.logits(row)
        made: list[int] = []
        for place in range(len(row), len(row) + continuation):
            made.append(int(out[number, place - 1].argmax()))
            out[number, place] = exact.logits(made[-1:])[0]
        continued.append(made)
    out.flush()
    del exact
    return {"continuations": continued, "low_memory_kl_divergence": _low_memory(job, continued, out)}


def _low_memory(job: dict[str, Any], continued: list[list[int]], exact: np.ndarray) -> float:
    """The mean KL divergence, in nats, from exact logits [rows, tokens, vocab_size] to those of low memory."""
    engine, total = Engine(Path(job["folder"]), "low", job["threads"]), 0.0
    for row, made, expected in zip(job["rows"], continued, exact, strict=True):
        engine.forget()
        ours, theirs = (_log_softmax(logits) for logits in (expected, engine.logits(row + made)))
        total += float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
    return total / len(exact)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _write_stub(folder: Path) -> None:
    """A graph that computes nothing, which is enough to load a tokenizer."""
    import MNN.expr as expr

    sizes = {"input_ids": [3, 1, 8], "attention_mask": [1, 1, 3, 3], "position_ids": [1, 3], "logits_index": [1]}
    inputs = []
    for name, size in sizes.items():
        inputs.append(expr.placeholder(size))
        inputs[-1].name = name
    logits = inputs[0] + sum((expr.reduce_sum(each) for each in inputs[2:]), expr.reduce_sum(inputs[1]))
    states = inputs[0] * expr.const([2.0], [1])
    logits.name, states.name = "logits", "hidden_states"
    expr.save([logits, states], str(folder / GRAPH))
    (folder / WEIGHTS).touch()


def main() -> None:
    """Do one job."""
    job = json.loads(sys.stdin.read())
    answer = os.dup(1)
    os.dup2(2, 1)  # the engine prints
    found: Any
    if "rows" in job:
        found = predict(job)
    else:
        folder = Path(job["folder"])
        if not (folder / GRAPH).exists():
            _write_stub(folder)
        engine = Engine(folder, "high", 1)
        found = engine.prompt(job["chat"]) if "chat" in job else [engine.token_ids(text) for text in job["texts"]]
    with os.fdopen(answer, "w") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main()
