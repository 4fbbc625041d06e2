"""onnxruntime-genai in a process of its own, run as a module: what breaks it takes no other process along.

A job comes as JSON on the standard input, with the model's folder. `{"folder", "texts"}` answers the token ids of
texts, as JSON on the standard output, and `{"folder", "chat"}` the prompt that a chat becomes. `{"folder", "rows",
"continuation", "logits", "threads"}` writes the logits of rows of token ids and of what the model continues them with
greedily, fp32 [rows, tokens + continuation, vocab_size], to a file of numpy, and answers `{"continuations"}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def token_ids(folder: str, texts: list[str]) -> list[list[int]]:
    """The ids of texts, in which special tokens are found."""
    import onnxruntime_genai as engine

    tokenizer = engine.Tokenizer(engine.Model(folder))
    return [[int(token) for token in tokenizer.encode(text)] for text in texts]


def chat_prompt(folder: str, messages: list[dict[str, str]]) -> str:
    """The prompt that the chat template makes of messages."""
    import onnxruntime_genai as engine

    tokenizer = engine.Tokenizer(engine.Model(folder))
    return tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)


def predict(folder: str, rows: np.ndarray, continuation: int, logits: Path, threads: int) -> list[list[int]]:
    """Write the logits of rows of tokens [rows, tokens] to a file; returns what each row was continued with."""
    import onnxruntime_genai as engine

    config = engine.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model, length, out = engine.Model(config), rows.shape[1], None
    continued = []
    for number, row in enumerate(rows):
        parameters = engine.GeneratorParams(model)
        parameters.set_search_options(max_length=length + continuation + 1, do_sample=False)
        generator = engine.Generator(model, parameters)
        generator.append_tokens(row)
        found = generator.get_output("logits")
        if out is None:
            size = (len(rows), length + continuation, found.shape[-1])
            out = np.lib.format.open_memmap(logits, mode="w+", dtype=np.float32, shape=size)
        out[number, :length] = found[0]
        made: list[int] = []
        for place in range(length, length + continuation):
            made.append(int(out[number, place - 1].argmax()))
            generator.append_tokens(np.array(made[-1:], dtype=np.int32))
            out[number, place] = generator.get_output("logits")[0, -1]
        continued.append(made)
    if out is not None:
        out.flush()
    return continued


def main() -> None:
    """Do one job."""
    job: dict[str, Any] = json.loads(sys.stdin.read())
    answer: Any
    if "texts" in job:
        answer = token_ids(job["folder"], job["texts"])
    elif "chat" in job:
        answer = chat_prompt(job["folder"], job["chat"])
    else:
        rows = np.array(job["rows"], dtype=np.int32)
        continued = predict(job["folder"], rows, job["continuation"], Path(job["logits"]), job["threads"])
        answer = {"continuations": continued}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
