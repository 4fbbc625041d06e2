"""Attention to INT8 keys and values in C, compiled by the machine's own compiler where there is one.

torch multiplies integers only after it has written them out as floating-point numbers, which takes longer than to read
states in 16 bits.
"""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from autoglm_compress.attention.int8 import Rounded
from autoglm_compress.attention.layout import apart

SOURCE = Path(__file__).with_name("int8.c")
REORDERED = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
"""What lets sums run in parallel. Not -ffast-math, with which a library makes the whole process flush subnormals."""
FLAGS = ("-O3", "-march=native", *REORDERED, "-fopenmp", "-shared", "-fPIC")
WIDEST = 1024
"""The widest vectors that the code takes."""


def native_products(queries: torch.Tensor, keys: Rounded) -> torch.Tensor | None:
    """Dot products, fp32 [batch, heads, n, length], of queries [batch, heads, n, width] with rounded keys.

    None if there is no compiler, or keys are not laid out as a cache holds them, on a CPU.
    """
    return _called("int8_products", queries, keys, (*queries.shape[:3], keys.codes.shape[2]))


def native_sums(weights: torch.Tensor, values: Rounded) -> torch.Tensor | None:
    """Sums, fp32 [batch, heads, n, width], of rounded values by weights [batch, heads, n, length], or None as above."""
    return _called("int8_sums", weights, values, (*weights.shape[:3], values.codes.shape[3]))


def _called(name: str, rows: torch.Tensor, rounded: Rounded, shape: tuple[int, ...]) -> torch.Tensor | None:
    """What a function makes of rows [batch, heads, n, …] and what the cache holds, in a tensor of such a shape."""
    batch, heads, length, width = rounded.codes.shape
    between = [elements for part in rounded if (elements := apart(part)) is not None]
    if rows.device.type != "cpu" or width > WIDEST or len(between) < len(rounded):
        return None
    library = _compiled()
    if library is None:
        return None
    given, found = rows.to(torch.float32).contiguous(), torch.empty(shape)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, *rounded, found)]
    sizes = (batch * heads, rows.shape[2], length, width, *between)
    getattr(library, name)(*pointers, *map(ctypes.c_int64, sizes))
    return found


@cache
def _compiled() -> ctypes.CDLL | None:
    """The functions, compiled once in a process; None if that does not work."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with TemporaryDirectory() as folder:
        library = Path(folder) / "int8.so"
        done = subprocess.run([compiler, *FLAGS, "-o", str(library), str(SOURCE)], capture_output=True, check=False)
        try:
            return ctypes.CDLL(str(library)) if done.returncode == 0 else None
        except OSError:
            return None
