"""Commands that run a model in an engine: `serve`, `verify`, `chat`, `benchmark`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autoglm_compress.commands.behaviour import one_message


class ServeWith(str, Enum):
    """The engine that serves."""

    auto = "auto"
    llama_cpp = "llama.cpp"
    transformers = "transformers"
    vllm = "vllm"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint, RUN/STAGE, or FILE.gguf.")]
Engine = Annotated[
    ServeWith, typer.Option(help="auto: llama.cpp for GGUF, else vLLM if it is there and takes the model.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tokens of a text with its answer. \\[default: the model's, up to 8192]"),
]


def serve(
    model: Model,
    engine: Engine = ServeWith.auto,
    host: Annotated[str, typer.Option(help="Where to listen. Others than this machine need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    tensor_parallel: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs that share the model; vLLM.")] = 1,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients call it. \\[default: the folder's or file's name]")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys of clients, one in each line. \\[default: none is asked]")
    ] = None,
    max_model_len: MaxLength = None,
) -> None:
    """Serve a checkpoint or a GGUF file by the API of OpenAI, with an engine that is installed.

    It is ready when a real token has come back. SIGTERM lets running requests end.
    """
    with one_message("stopped"):
        from autoglm_compress.serving.command import ServeRequest
        from autoglm_compress.serving.command import serve as start

        request = ServeRequest(
            model, engine.value, host, port, tensor_parallel, served_model_name, api_key_file, max_model_len
        )
        start(request, typer.echo)


def verify(
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="Of the API, with /v1 at its end.")
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="\\[default: the first that the server lists]")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A key for the server, in its first line.")
    ] = None,
) -> None:
    """Ask a server all that a client relies on, and show what it answered.

    Exit code 0: all is well. 1: a check failed. 2: the server cannot be asked.
    """
    with one_message():
        from autoglm_compress.serving.command import require_packages
        from autoglm_compress.serving.keys import read_keys

        require_packages("client", "openai", "httpx2")
        from autoglm_compress.serving.table import checks_table
        from autoglm_compress.serving.verifying import Result
        from autoglm_compress.serving.verifying import verify as ask

        key = read_keys(api_key_file)[0].decode() if api_key_file else None
        checks = ask(base_url, model, key)
        Console().print(checks_table(checks))
        if any(check.result is Result.failed for check in checks):
            raise typer.Exit(1)


def chat(
    model: Model,
    engine: Engine = ServeWith.auto,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Another that is told the same, such as the source.")
    ] = None,
    max_model_len: MaxLength = None,
) -> None:
    """Talk to a model in the terminal, or to two side by side. Answers are the likeliest ones."""
    with one_message("stopped"):
        import asyncio

        from autoglm_compress.serving.command import needed_bytes, prepare

        target, chosen, context = prepare(model, engine.value, max_model_len)
        models = [(target, chosen)]
        if against is not None:
            other = prepare(against, "auto", max_model_len, beside=needed_bytes(target, chosen, context))
            models.append(other[:2])
        from autoglm_compress.serving.chatting import converse

        asyncio.run(converse(models, _hear, lambda piece: typer.echo(piece, nl=False), typer.echo))


def _hear() -> str | None:
    """A line of the user; None when there are no more."""
    try:
        return input("> ")
    except EOFError:
        return None


def benchmark(
    model: Model,
    engine: Engine = ServeWith.auto,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N,…", help="How long prompts are, about: the engine's count is shown.")
    ] = "128,512,2048",
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Of each answer.")] = 64,
    starts: Annotated[int, typer.Option(min=1, metavar="N", help="How often the engine is started.")] = 3,
    max_model_len: MaxLength = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")] = None,
) -> None:
    """Measure what a person would feel: time to load, to the first token, tokens per second, memory.

    Medians of several starts, with the least and the most. Nobody else asks the engine.
    """
    with one_message("stopped"):
        from autoglm_compress.serving.command import prepare, prompt_lengths, require_folder

        require_folder(json_file)
        target, chosen, context = prepare(model, engine.value, max_model_len)
        lengths = prompt_lengths(prompt_tokens, new_tokens, context)
        from autoglm_compress.atomic import write_json
        from autoglm_compress.serving.benchmarking import measure
        from autoglm_compress.serving.table import speeds_table

        found = {"model": str(target.path)} | measure(chosen, lengths, new_tokens, starts, typer.echo)
        if json_file is not None:
            write_json(json_file, found)
        Console().print(speeds_table(found))
