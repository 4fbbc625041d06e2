"""Servers started as a user starts them."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from support.places import ROOT

START_SECONDS = 180
READY = re.compile(r"Uvicorn running on (http://\S+)")


@dataclass
class Server:
    """A server, its address, and what it printed until now."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    def wait_until_ready(self) -> None:
        """Read what it prints until it says that it listens."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if found := READY.search(line):
                self.url = found[1]
                break
        assert self.url, "\n".join(self.lines)
        threading.Thread(target=self._read_on, daemon=True).start()

    def _read_on(self) -> None:
        assert self.process.stdout is not None
        self.lines += (line.rstrip() for line in self.process.stdout)

    @property
    def api(self) -> str:
        """The base URL for clients."""
        return f"{self.url}/v1"

    def engine(self) -> psutil.Process:
        """The engine's process."""
        [child] = psutil.Process(self.process.pid).children()
        return child

    def stop(self) -> int:
        """End it as a supervisor does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(model: Path, *arguments: object) -> Iterator[Server]:
    """A server of a model, on any free port."""
    command = [sys.executable, "-m", "autoglm_compress", "serve", model, "--port", 0, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    server = Server(process)
    limit = threading.Timer(START_SECONDS, process.kill)
    limit.start()
    try:
        server.wait_until_ready()
        limit.cancel()
        yield server
    finally:
        limit.cancel()
        if process.poll() is None:
            server.stop()
