"""How the process gets memory from the system."""

import platform

import pytest

from autoglm_compress.memory import keep_freed_memory


def test_glibc_takes_the_settings():
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("it has no mallopt"))
    assert not keep_freed_memory()
