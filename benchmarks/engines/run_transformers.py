"""transformers, in the dtype of the checkpoint; a job with `logits` writes those of the rows in fp32, as reference."""

import time
from typing import Any

import numpy as np
import torch
from measured_engine import Job, main
from transformers import AutoModelForCausalLM


class Transformers:
    """A model with its cache (see `Engine`)."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job["threads"])
        dtype = torch.float32 if "logits" in job else "auto"
        self._model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
        if "logits" in job:
            np.save(job["logits"], np.stack([self.logits(row.tolist()) for row in np.load(job["rows"])]))

    @torch.no_grad()
    def prefill(self, tokens: list[int]) -> float:
        began = time.perf_counter()
        self._model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    @torch.no_grad()
    def decode(self, prompt: list[int], count: int) -> float:
        found = self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(count):
            token = found.logits[:, -1:].argmax(-1)
            found = self._model(token, past_key_values=found.past_key_values, use_cache=True)
        return (time.perf_counter() - began) / count

    @torch.no_grad()
    def logits(self, row: list[int]) -> np.ndarray:
        return self._model(torch.tensor([row])).logits[0].float().numpy()


if __name__ == "__main__":
    main(Transformers)
