"""ONNX Runtime by onnxruntime-genai."""

import json
import time
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from measured_engine import Job, main

AT_ONCE = 512
"""Tokens: it makes the logits of all that it is given at once."""


class Genai:
    """A model, and a generator for each text (see `Engine`)."""

    def __init__(self, job: Job) -> None:
        config = genai.Config(job["model"])
        options = {"session_options": {"intra_op_num_threads": job["threads"]}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = genai.Model(config)
        self._context = job["context"]

    def prefill(self, tokens: list[int]) -> float:
        generator = self._generator()
        began = time.perf_counter()
        for start in range(0, len(tokens), AT_ONCE):
            generator.append_tokens(np.array(tokens[start : start + AT_ONCE], dtype=np.int32))
        generator.get_logits()
        return time.perf_counter() - began

    def decode(self, prompt: list[int], count: int) -> float:
        generator = self._generator()
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        began = time.perf_counter()
        for _ in range(count):
            token = generator.get_logits().argmax()
            generator.append_tokens(np.array([token], dtype=np.int32))
        generator.get_logits()
        return (time.perf_counter() - began) / count

    def logits(self, row: list[int]) -> np.ndarray:
        generator = self._generator()
        generator.append_tokens(np.array(row, dtype=np.int32))
        return np.array(generator.get_output("logits")[0], dtype=np.float32)

    def _generator(self) -> Any:
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._context, do_sample=False)
        return genai.Generator(self._model, parameters)


if __name__ == "__main__":
    main(Genai)
