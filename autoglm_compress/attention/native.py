"""Products with INT8 keys in C, compiled by the machine's own compiler where there is one.

torch multiplies integers only after it has written them out as floating-point numbers, which takes longer than to read
keys in 16 bits.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from autoglm_compress.attention.int8 import Rounded
from autoglm_compress.attention.layout import apart

SOURCE = Path(__file__).with_name("products.c")
REORDERED = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
"""What lets sums run in parallel. Not -ffast-math, with which a library makes the whole process flush subnormals."""
FLAGS = ("-O3", "-march=native", *REORDERED, "-fopenmp", "-shared", "-fPIC")
WIDEST = 1024
"""The widest vectors that the code takes."""


def native_products(queries: torch.Tensor, keys: Rounded) -> torch.Tensor | None:
    """Dot products, fp32 [batch, heads, n, length], of queries [batch, heads, n, width] with rounded keys.

    None if there is no compiler, or keys are not laid out as a cache holds them, on a CPU.
    """
    codes, scales = keys
    batch, heads, length, width = codes.shape
    between = apart(codes), apart(scales)
    if codes.device.type != "cpu" or width > WIDEST or None in between:
        return None
    function = _compiled()
    if function is None:
        return None
    given = queries.to(torch.float32).contiguous()
    found = torch.empty(*given.shape[:3], length)
    pointers = (tensor.data_ptr() for tensor in (given, codes, scales, found))
    function(*pointers, batch * heads, given.shape[2], length, width, *between)
    return found


@cache
def _compiled() -> Callable[..., None] | None:
    """The function, compiled once in a process; None if that does not work."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with TemporaryDirectory() as folder:
        library = Path(folder) / "products.so"
        done = subprocess.run([compiler, *FLAGS, "-o", str(library), str(SOURCE)], capture_output=True, check=False)
        try:
            function = ctypes.CDLL(str(library)).int8_products if done.returncode == 0 else None
        except OSError:
            function = None
    if function is not None:
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 6
        function.restype = None
    return function
