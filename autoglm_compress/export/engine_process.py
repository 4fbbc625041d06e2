"""Engines in processes of their own: a file that is broken may end a process without a word."""

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


class EngineError(Exception):
    """The engine did not do a job; the message is the last that it said."""


def has_package(name: str) -> bool:
    """Whether a package is installed."""
    return find_spec(name) is not None


def ask_engine(module: str, job: Mapping[str, Any]) -> Any:
    """What a module of this package answers when it is run with a job, both as JSON.

    Raises:
        EngineError: it ended without an answer.
    """
    process = subprocess.run([sys.executable, "-m", module], input=json.dumps(job).encode(), capture_output=True)
    if process.returncode != 0:
        raise EngineError(_reason(process.stderr.decode(errors="replace"), process.returncode))
    return json.loads(process.stdout)


def _reason(said: str, code: int) -> str:
    """The line that says most about why a process ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    named = [line for line in errors if not line.startswith("RuntimeError")] or errors or lines or ["no message"]
    return f"{named[0]} (exit code {code})"
