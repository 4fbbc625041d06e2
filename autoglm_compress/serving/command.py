"""`serve`: the checks before anything is loaded, and the server until it is ended."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from autoglm_compress.errors import UserError
from autoglm_compress.export.engine_process import has_package
from autoglm_compress.report.numbers import size
from autoglm_compress.serving.engines import INSTALL, Engine, Wanted, choose_engine, has_gpu
from autoglm_compress.serving.keys import read_keys, require_key_for
from autoglm_compress.serving.target import Target, find_target

LONGEST_CONTEXT = 8192
"""Tokens of a text with its answer where nobody says: a cache for more may not fit beside the weights."""
SERVER = ("fastapi", "uvicorn", "prometheus_client")
"""Packages that `serve` needs besides those of a client."""
DRAIN_SECONDS = 30
"""How long running requests may take after SIGTERM."""


@dataclass(frozen=True)
class ServeRequest:
    """What `serve` is told; None and 0 stand for the defaults that the command line describes."""

    given: Path
    engine: str
    host: str
    port: int
    tensor_parallel: int
    served_as: str | None
    key_file: Path | None
    context: int | None


def serve(request: ServeRequest, note: Callable[[str], None]) -> None:
    """Serve a model until the process is ended.

    Args:
        request: what to serve, and how.
        note: shows a line to the user.

    Raises:
        UserError: something cannot be, which is found before anything is loaded; or the engine did not start.
    """
    require_packages("serve", *SERVER)
    keys = read_keys(request.key_file) if request.key_file else ()
    require_key_for(request.host, keys)
    target, engine, context = prepare(request.given, request.engine, request.context, request.tensor_parallel)
    from autoglm_compress.serving.gateway import Served
    from autoglm_compress.serving.running import run

    served = Served(target, request.served_as or target.name, context, keys)
    with _bound(request.host, request.port) as listener:
        note(f"loading {target.path} with {engine.name}, {context} tokens of context")
        asyncio.run(run(served, engine, listener, DRAIN_SECONDS, note))


def prepare(
    given: Path, engine: str, context: int | None, tensor_parallel: int = 1, *, beside: int = 0
) -> tuple[Target, Engine, int]:
    """The model that a path means, its engine, and the tokens of a text with its answer.

    Args:
        given: a checkpoint, an export, or RUN/STAGE.
        engine: `auto` or a name.
        context: tokens; a default if None.
        tensor_parallel: GPUs that share the model.
        beside: bytes that something else will take.

    Raises:
        UserError: it cannot be served, or not in the memory that is free.
    """
    require_packages("serve", "httpx2")
    target = find_target(given)
    tokens = _context(target, context)
    chosen = choose_engine(target, Wanted(engine, tokens, tensor_parallel))
    _require_memory(target, needed_bytes(target, chosen, tokens) + beside)
    return target, chosen, tokens


def needed_bytes(target: Target, engine: Engine, context: int) -> int:
    """Weights, and keys and values of the texts that an engine takes memory for."""
    return target.weight_bytes + target.cache_bytes(context) * engine.caches


def require_packages(extra: str, *packages: str) -> None:
    """Raise UserError if a package of an extra is not installed."""
    for package in packages:
        if not has_package(package):
            raise UserError(f"the package {package} is not installed. {INSTALL.format(extra=extra)}")


def _context(target: Target, given: int | None) -> int:
    if given is None:
        return min(target.context, LONGEST_CONTEXT)
    if given > target.context:
        raise UserError(f"--max-model-len {given}: {target.path} reads {target.context} tokens at most.")
    return given


def _require_memory(target: Target, need: int) -> None:
    """Raise UserError if so many bytes are not free. On a GPU, the engine says so."""
    free = psutil.virtual_memory().available
    if need > free and not has_gpu():
        raise UserError(
            f"{target.path}: {size(need)} are needed, of which {size(target.weight_bytes)} for weights, and "
            f"{size(free)} are free. Give a smaller --max-model-len, or serve a quantized checkpoint."
        )


def _bound(host: str, port: int) -> socket.socket:
    """A socket with the address, on which nothing is answered yet.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}. Give another --port, or 0 for any.") from None
    return listener


def require_folder(file: Path | None) -> None:
    """Raise UserError if the folder of a file to write is not there."""
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json {file}: no such folder: {file.parent}. Make it, or give another file.")


def prompt_lengths(given: str, new_tokens: int, context: int) -> list[int]:
    """Lengths of prompts as the command line gives them.

    Raises:
        UserError: they are no whole numbers from 1, or an answer has no room behind one.
    """
    try:
        lengths = sorted({int(part) for part in given.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1:
        raise UserError(f"--prompt-tokens {given}: expected whole numbers from 1 with commas between them.")
    if lengths[-1] + new_tokens > context:
        raise UserError(
            f"--prompt-tokens {given}: {lengths[-1]} and {new_tokens} of the answer are more than the {context} of the "
            "context. Give fewer, or a larger --max-model-len."
        )
    return lengths
