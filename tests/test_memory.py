"""How the process gets memory from the system."""

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from autoglm_compress.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def some_batches():
    before = faults()
    for _ in range(20):
        blocks = [torch.ones(1 << 18) for _ in range(160)]
        del blocks
    return faults() - before

assert keep_freed_memory()
some_batches()
print(some_batches())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_asking_the_system():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    pages = 20 * 160 * (1 << 20) / resource.getpagesize()
    assert int(done.stdout) < pages / 100
