"""The inputs of modules within a layer while hidden states go through the layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class _Captured(Exception):  # noqa: N818 - not an error
    """Ends a forward pass as soon as the wanted activation is known."""


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """A linear within a module."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def capture_input(module: nn.Module, run: Callable[..., Any], *inputs: torch.Tensor) -> torch.Tensor:
    """The input of a module when hidden states are sent through its layer. The forward pass ends there.

    Args:
        module: within the layer, or all of it.
        run: what sends the layer's inputs through it.
        inputs: what `run` takes.
    """
    seen: list[torch.Tensor] = []

    def hook(_: nn.Module, found: tuple[torch.Tensor, ...]) -> None:
        seen.append(found[0])
        raise _Captured

    handle = module.register_forward_pre_hook(hook)
    try:
        run(*inputs)
    except _Captured:
        pass
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def copy_input(module: nn.Module, place: torch.Tensor) -> Iterator[None]:
    """Copy a module's input to another tensor while the context is open."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        place.copy_(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
