"""How the process gets memory from the system."""

import platform

import psutil
import pytest
import torch

from autoglm_compress.memory import MOST_FREED, bound_freed_memory, keep_freed_memory


def test_glibc_takes_the_settings():
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("it has no mallopt"))
    assert not keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_much_that_was_freed_between_used_blocks_is_given_back():
    keep_freed_memory()
    blocks = [torch.ones(1 << 21) for _ in range(64)]  # of 8 MiB
    used = blocks[1::4]
    full = psutil.Process().memory_info().rss
    del blocks
    bound_freed_memory()
    assert full - psutil.Process().memory_info().rss > MOST_FREED
    assert all(bool((block == 1).all()) for block in used)
