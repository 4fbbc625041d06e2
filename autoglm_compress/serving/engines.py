"""The engines that can serve, what each takes, and how each is started."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoglm_compress.errors import UserError
from autoglm_compress.export.engine_process import has_package
from autoglm_compress.serving import llama_cpp_server
from autoglm_compress.serving.target import Target

HOST = "127.0.0.1"
LLAMA_CPP_SLOTS = 4
VLLM_SLOTS = 64
VLLM_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention has kernels for."""
VLLM_REASONING_PARSERS = {"glm4v": "glm45", "glm46v": "glm45", "glm4": "glm45", "qwen3": "qwen3", "qwen3_vl": "qwen3"}
"""vLLM's parsers for what a model thinks, by model type."""
INSTALL = "Install it with: pip install 'autoglm-compress[{extra}]'"


@dataclass(frozen=True)
class Launch:
    """How the process of an engine is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    job: str = ""
    """What it reads from its standard input."""


@dataclass(frozen=True)
class Engine:
    """An engine for one model.

    Attributes:
        name: for people.
        model: what a request must call the model.
        slots: how many requests it works on at the same time.
        launch: how it is started, given its port and the key that it shall ask for.
        exactly: fields of a request of `/v1/completions` that is answered with so many tokens.
        caches: for how many texts, of all the context, it takes memory when it starts.
        strict: whether it refuses texts that are too long, and stops when the client of a whole answer is gone.
        takes_reasoning_field: whether a request may say if reasoning is wanted.
    """

    name: str
    model: str
    slots: int
    launch: Callable[[int, str], Launch]
    exactly: Callable[[int], Mapping[str, Any]]
    caches: int = 1
    strict: bool = True
    takes_reasoning_field: bool = False


@dataclass(frozen=True)
class Wanted:
    """What a user wants of an engine: `auto` or its name, tokens of a text with its answer, and GPUs to share it."""

    engine: str
    context: int
    tensor_parallel: int = 1


def choose_engine(target: Target, wanted: Wanted) -> Engine:
    """The engine that serves a model.

    Raises:
        UserError: the engine is not installed or cannot take the model; the message names one that can.
    """
    name = _named(target, wanted.engine)
    if wanted.tensor_parallel > 1 and name != "vllm":
        raise UserError(f"--tensor-parallel {wanted.tensor_parallel}: {name} runs in one process. Use --engine vllm.")
    return MAKERS[name](target, wanted)


def _named(target: Target, given: str) -> str:
    if target.is_gguf:
        if given not in ("auto", "llama.cpp"):
            raise UserError(f"--engine {given}: {target.path.name} is a GGUF file. Use --engine llama.cpp.")
        return "llama.cpp"
    if given == "llama.cpp":
        raise UserError(
            f"--engine llama.cpp: {target.path} is a checkpoint. Export it first with autoglm-compress export "
            f"{target.path} --format gguf --output {target.name}-gguf, or use --engine transformers."
        )
    if given != "auto":
        return given
    return "transformers" if _vllm() is None or _vllm_refuses(target) else "vllm"


def _exactly(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}


def _exactly_by_settings(tokens: int) -> dict[str, Any]:
    """transformers takes all its settings as JSON in a text."""
    settings = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
    return {"generation_config": json.dumps(settings)}


def _require(package: str, extra: str) -> None:
    if not has_package(package):
        raise UserError(f"the package {package} is not installed. {INSTALL.format(extra=extra)}")


def _llama_cpp(target: Target, wanted: Wanted) -> Engine:
    _require("xllamacpp", "gguf,serve")
    job = {
        "file": str(target.path),
        "vision": str(target.vision) if target.vision else None,
        "context": wanted.context,
        "slots": LLAMA_CPP_SLOTS,
        "threads": _threads(),
    }

    def launch(port: int, key: str) -> Launch:
        command = (sys.executable, "-m", llama_cpp_server.__name__)
        return Launch(command, job=json.dumps(job | {"port": port, "key": key}))

    return Engine("llama.cpp", target.name, LLAMA_CPP_SLOTS, launch, _exactly, caches=LLAMA_CPP_SLOTS)


def _threads() -> int:
    """As many as this process may use, or as a user says."""
    if given := os.environ.get("OMP_NUM_THREADS", ""):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _transformers(target: Target, wanted: Wanted) -> Engine:
    _require("openai", "serve")
    folder = str(target.path.resolve())
    if "@" in folder:
        raise UserError(f"{folder}: transformers serve takes no path with an @ in it. Rename the folder.")
    # It would look for a newer version of itself, and for the folder on the hub.
    environment = {"HF_HUB_OFFLINE": "1"}

    def launch(port: int, key: str) -> Launch:
        command = (sys.executable, "-m", "transformers.cli.transformers", "serve", folder)
        return Launch((*command, "--host", HOST, "--port", str(port)), environment)

    return Engine("transformers", folder, 1, launch, _exactly_by_settings, strict=False)


def _vllm_engine(target: Target, wanted: Wanted) -> Engine:
    program = _vllm()
    if program is None:
        raise UserError(
            "--engine vllm: no program vllm is found. Install vLLM in an environment of its own and put its bin on "
            "PATH, or use --engine transformers."
        )
    if refused := _vllm_refuses(target):
        raise UserError(f"--engine vllm: {target.path}: {refused}. Use --engine transformers, or export it as GGUF.")
    options = ["--host", HOST, "--served-model-name", target.name, "--max-model-len", str(wanted.context)]
    options += ["--tensor-parallel-size", str(wanted.tensor_parallel)]
    if target.thinks and target.model_type in VLLM_REASONING_PARSERS:
        options += ["--reasoning-parser", VLLM_REASONING_PARSERS[target.model_type]]

    def launch(port: int, key: str) -> Launch:
        command = (program, "serve", str(target.path), *options, "--port", str(port))
        return Launch(command, {"VLLM_API_KEY": key})

    return Engine("vllm", target.name, VLLM_SLOTS, launch, _exactly, takes_reasoning_field=True)


def _vllm() -> str | None:
    """The program, beside this Python or on PATH."""
    return shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def has_gpu() -> bool:
    """Whether the system has a GPU of NVIDIA or AMD. Asking torch would take seconds."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


def _vllm_refuses(target: Target) -> str:
    """Why vLLM cannot serve a checkpoint; empty if it can."""
    if target.head_dim not in VLLM_HEAD_DIMS:
        return f"head_dim is {target.head_dim}, and its attention has kernels for {', '.join(map(str, VLLM_HEAD_DIMS))}"
    if target.weight_only_bits == 8 and not has_gpu():
        return "INT8 weights without quantized activations have no kernel on a CPU"
    return ""


MAKERS: dict[str, Callable[[Target, Wanted], Engine]] = {
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
    "vllm": _vllm_engine,
}
