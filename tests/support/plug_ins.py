"""Stages of other packages, which their entry points give, without installing a package."""

import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest

from autoglm_compress.stages import registry

MODULE = "someone_elses_stages"
AddStage = Callable[[str, Any], None]


@pytest.fixture
def add_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[AddStage]:
    """Gives a name to a stage of another package; one that is None is not in the module that the entry point names."""
    module, entries = ModuleType(MODULE), []
    monkeypatch.setitem(sys.modules, MODULE, module)
    find = metadata.entry_points
    monkeypatch.setattr(
        metadata, "entry_points", lambda **chosen: entries if chosen == {"group": registry.GROUP} else find(**chosen)
    )

    def add(name: str, kind: Any) -> None:
        if kind is not None:
            setattr(module, name, kind)
        entries.append(metadata.EntryPoint(name, f"{MODULE}:{name}", registry.GROUP))
        registry.plug_ins.cache_clear()

    yield add
    registry.plug_ins.cache_clear()
