"""How all commands end, and what they keep quiet."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from autoglm_compress.errors import Terminated, UserError


@contextmanager
def one_message(stopped: str = "stopped") -> Iterator[None]:
    """End in one message: exit code 2 for errors that the user can fix, and the message `stopped` at Ctrl-C or
    SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (KeyboardInterrupt, Terminated) as error:
        typer.echo(f"\n{stopped}", err=True)
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise Terminated


def quiet_transformers() -> None:
    """Silence transformers, whose progress bars and advice would mix with ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
