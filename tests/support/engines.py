"""MNN's converter without the seconds that a new process takes to import `torch` and `transformers`."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.running import CHILD_SECONDS

IMPORTED = ["autoglm_compress.export.mnn_builder", "autoglm_compress.checkpoint", "onnx", "torch.onnx"]
IMPORTED += ["transformers.models.auto.tokenization_auto", "transformers.models.glm.modeling_glm"]


@dataclass(frozen=True)
class Forked:
    """In the place of `subprocess`: the converter is a child of a process that has imported what is slow.

    `mutants` are functions that stand in for others there, both by names such as `package.module:Class.function`.
    """

    mutants: Mapping[str, str] = field(default_factory=dict)

    def run(self, command: Sequence[str], **options: Any) -> Any:
        """What `subprocess.run` gives."""
        if not command[-1].endswith("mnn_builder"):
            return subprocess.run(command, **options)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("in", "out", "err")]
            streams[0].write_bytes(options["input"])
            arguments = (command[-1], [str(path) for path in streams], dict(self.mutants))
            child = context.Process(target=_main, args=arguments)
            child.start()
            child.join(CHILD_SECONDS)
            assert child.exitcode is not None, f"still running after {CHILD_SECONDS} s"
            said = [path.read_bytes() for path in streams[1:]]
        return SimpleNamespace(returncode=child.exitcode, stdout=said[0], stderr=said[1])


def _main(module: str, streams: Sequence[str], mutants: Mapping[str, str]) -> None:
    flags = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for number, (stream, flag) in enumerate(zip(streams, flags, strict=True)):
        os.dup2(os.open(stream, flag), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
    for replaced, mutant in mutants.items():
        owner, name = _owner(replaced)
        setattr(owner, name, getattr(*_owner(mutant)))
    import_module(module).main()


def _owner(function: str) -> tuple[Any, str]:
    """What has a function, and its name there."""
    module, _, path = function.partition(":")
    *parents, name = path.split(".")
    owner: Any = import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name
