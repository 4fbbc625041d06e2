"""MNN's `llm` engine; `memory` is its mode: low rounds activations to 8 bits, high computes in fp32."""

import time
from typing import Any

import MNN.llm
import numpy as np
from measured_engine import Job, main


class Mnn:
    """A model with its cache (see `Engine`)."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model = self._load(all_logits=False)

    def prefill(self, tokens: list[int]) -> float:
        self._model.reset()
        began = time.perf_counter()
        np.array(self._model.forward(tokens).read())
        return time.perf_counter() - began

    def decode(self, prompt: list[int], count: int) -> float:
        self._model.reset()
        found = np.array(self._model.forward(prompt).read())
        began = time.perf_counter()
        for _ in range(count):
            found = np.array(self._model.forward([int(found.argmax())]).read())
        return (time.perf_counter() - began) / count

    def logits(self, row: list[int]) -> np.ndarray:
        if not self._job.get("all_logits"):
            self._job["all_logits"] = True
            self._model = self._load(all_logits=True)
        self._model.reset()
        return np.array(self._model.forward(row).read(), dtype=np.float32).reshape(len(row), -1)

    def _load(self, *, all_logits: bool) -> Any:
        model = MNN.llm.create(f"{self._job['model']}/config.json")
        model.set_config(
            {
                "all_logits": all_logits,
                "memory": self._job["memory"],
                "precision": "high",
                "thread_num": self._job["threads"],
                "use_mmap": False,
            }
        )
        model.load()
        return model


if __name__ == "__main__":
    main(Mnn)
