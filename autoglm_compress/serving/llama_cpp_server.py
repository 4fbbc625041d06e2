"""llama.cpp's own server in a process of its own, run as a module.

A job comes as JSON on the standard input: `{"file", "vision", "context", "slots", "threads", "port", "key"}`.
"""

import json
import sys
import threading
from typing import Any


def main() -> None:
    """Serve one file until the process is ended."""
    job: dict[str, Any] = json.loads(sys.stdin.read())
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["file"]
    if job["vision"]:
        parameters.mmproj.path = job["vision"]
    parameters.hostnames, parameters.port, parameters.api_keys = ["127.0.0.1"], job["port"], [job["key"]]
    # The context is divided among slots.
    parameters.n_parallel, parameters.n_ctx = job["slots"], job["slots"] * job["context"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
    # Whole prompts would be kept besides those in the slots, in up to 8 GB.
    parameters.cache_ram_mib = 0
    # The context is as asked for, or the start fails.
    parameters.fit_params = False
    parameters.ui = parameters.endpoint_slots = False
    try:
        _server = xllamacpp.Server(parameters)
    except RuntimeError as failure:  # llama.cpp has said more in its log than the exception does
        sys.exit(str(failure))
    threading.Event().wait()


if __name__ == "__main__":
    main()
