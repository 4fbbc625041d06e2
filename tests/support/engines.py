"""MNN's converter without the seconds that a new process takes to import `torch` and `transformers`."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.running import CHILD_SECONDS

IMPORTED = ["autoglm_compress.export.mnn_builder", "autoglm_compress.checkpoint", "onnx", "torch.onnx"]
IMPORTED += ["transformers.models.auto.tokenization_auto", "transformers.models.glm.modeling_glm"]
run_process = subprocess.run


def run_forked(command: list[str], **options: Any) -> Any:
    """What `subprocess.run` gives for a module, run by a child of a process that has imported what is slow."""
    if not command[-1].endswith("mnn_builder"):
        return run_process(command, **options)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("in", "out", "err")]
        streams[0].write_bytes(options["input"])
        child = context.Process(target=_main, args=(command[-1], [str(path) for path in streams]))
        child.start()
        child.join(CHILD_SECONDS)
        assert child.exitcode is not None, f"still running after {CHILD_SECONDS} s"
        return SimpleNamespace(
            returncode=child.exitcode, stdout=streams[1].read_bytes(), stderr=streams[2].read_bytes()
        )


def _main(module: str, streams: list[str]) -> None:
    flags = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for number, (stream, flag) in enumerate(zip(streams, flags, strict=True)):
        os.dup2(os.open(stream, flag), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
    import_module(module).main()
