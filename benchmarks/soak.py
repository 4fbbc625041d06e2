"""A served model under load: no answer is lost, mixed up or late, and memory stays flat.

    python benchmarks/soak.py MODEL [--requests 200] [--at-once 8] [--cancel 0.2]

`serve` is started as a user starts it. Requests go out several at a time. Some clients go away in the middle of a
stream, and the engine is killed once. An answer is right if the same prompt, asked alone, got the same. Batches round
differently, so that the likeliest token may change: such answers are counted apart. Memory is of the gateway and of the
engine, after a tenth, half (then the kill), three fifths and all of the requests.
"""

import argparse
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
from chains import write_results

PROMPTS = [f"{number}. Return the number of items in a container." for number in range(16)]
TOKENS = 48
RETRIES = 120


class Soak:
    """Requests to one server, and what became of them."""

    def __init__(self, url: str, model: str, cancel: float, seed: int) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.model = model
        self.cancel = cancel
        self.random = random.Random(seed)
        self.alone = {prompt: self.answer(prompt) for prompt in PROMPTS}
        self.found: Counter[str] = Counter()

    def answer(self, prompt: str) -> str:
        settings = {"model": self.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        return self.client.completions.create(**settings).choices[0].text

    def stream(self, prompt: str, most: int) -> str:
        settings = {"model": self.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        text = ""
        with self.client.completions.create(**settings, stream=True) as events:
            for number, event in enumerate(events):
                text += event.choices[0].text if event.choices else ""
                if number >= most:
                    break
        return text

    def one(self, number: int) -> None:
        """A request that is asked again while the engine is away, as a client would."""
        prompt = self.random.choice(PROMPTS)
        goes_away, streams = self.random.random() < self.cancel, self.random.random() < 0.5
        for _ in range(RETRIES):
            try:
                if goes_away:
                    self.stream(prompt, self.random.randrange(8))
                    self.found["gone away"] += 1
                    return
                text = self.stream(prompt, TOKENS * 2) if streams else self.answer(prompt)
                self.found[self._kind(prompt, text)] += 1
                return
            except (openai.InternalServerError, openai.APIError) as error:
                self.found[f"asked again: {type(error).__name__}"] += 1
                time.sleep(0.5)
        self.found["lost"] += 1

    def _kind(self, prompt: str, text: str) -> str:
        if text == self.alone[prompt]:
            return "right"
        return "mixed up" if text in self.alone.values() else "other rounding"


def memory(server: subprocess.Popen[str]) -> dict[str, int]:
    gateway = psutil.Process(server.pid)
    [engine] = gateway.children()
    return {"gateway": gateway.memory_info().rss, "engine": engine.memory_info().rss, "engine_pid": engine.pid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--cancel", type=float, default=0.2)
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/soak.json"))
    arguments = parser.parse_args()
    command = [sys.executable, "-u", "-m", "autoglm_compress", "serve", str(arguments.model), "--port", "0"]
    command += ["--served-model-name", "soaked"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    lines = iter(server.stdout.readline, "")
    url = next(found[1] for line in lines if (found := re.search(r"Uvicorn running on (http://\S+)", line)))
    threading.Thread(target=lambda: print(*lines, sep="", end="", flush=True), daemon=True).start()
    soak = Soak(url, "soaked", arguments.cancel, arguments.seed)
    marks = [arguments.requests * share // 10 for share in (1, 5, 6)]
    began, measured = time.monotonic(), []
    with ThreadPoolExecutor(arguments.at_once) as pool:
        for number, _ in enumerate(pool.map(soak.one, range(arguments.requests))):
            if number in marks:
                measured.append(memory(server))
            if number == marks[1] and not arguments.no_kill:
                psutil.Process(measured[-1]["engine_pid"]).kill()
    measured.append(memory(server))
    seconds = time.monotonic() - began
    server.terminate()
    code = server.wait(60)
    results = {"seconds": seconds, "requests": dict(soak.found), "memory": measured, "exit_code": code}
    print(results)
    write_results(arguments.output, results)
    assert not soak.found["lost"] + soak.found["mixed up"], "answers were lost or mixed up"


if __name__ == "__main__":
    main()
