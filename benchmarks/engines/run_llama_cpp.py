"""llama.cpp, as the package xllamacpp brings it. `reorder` says whether it may put weights into another order."""

import ctypes
import time

import numpy as np
from measured_engine import Job, main

from autoglm_compress.export.llama_cpp import LlamaCpp

LARGEST_BATCH = 2048
"""Tokens that llama.cpp takes at once if it is not told otherwise."""


class Timed(LlamaCpp):
    """The library, without logits that nobody asked for (see `Engine`)."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        parameters = self.library.llama_model_default_params()
        parameters.use_extra_bufts = job["reorder"]
        self._loaded = self.library.llama_model_load_from_file(job["model"].encode(), parameters)
        if not self._loaded:
            raise RuntimeError("llama.cpp does not load the file")
        self._threads = job["threads"]
        settings = self.library.llama_context_default_params()
        settings.n_ctx = job["context"]
        self._running = self.library.llama_init_from_model(self._loaded, settings)
        self.library.llama_set_n_threads(self._running, self._threads, self._threads)
        self._tokens = self.library.llama_batch_init(LARGEST_BATCH, 0, 1)
        self._size = self.vocabulary_size(self._loaded)

    def prefill(self, tokens: list[int]) -> float:
        self._forget()
        began = time.perf_counter()
        self._send(tokens, 0)
        return time.perf_counter() - began

    def decode(self, prompt: list[int], count: int) -> float:
        self._forget()
        token = self._send(prompt, 0)
        began = time.perf_counter()
        for place in range(len(prompt), len(prompt) + count):
            token = self._send([token], place)
        return (time.perf_counter() - began) / count

    def logits(self, row: list[int]) -> np.ndarray:  # type: ignore[override]
        out = np.empty((1, len(row), self._size), np.float32)
        super().logits(self._loaded, np.array([row]), 0, self._threads, out)
        return out[0]

    def _forget(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self._running), True)

    def _send(self, tokens: list[int], start: int) -> int:
        """Send tokens through the model after `start` others; the likeliest next one."""
        batch, last = self._tokens, len(tokens) - 1
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, place == last
        if self.library.llama_decode(self._running, batch) != 0:
            raise RuntimeError("llama.cpp cannot compute with the file")
        pointer: ctypes._Pointer[ctypes.c_float] = self.library.llama_get_logits_ith(self._running, last)
        return int(np.ctypeslib.as_array(pointer, (self._size,)).argmax())


if __name__ == "__main__":
    main(Timed)
