"""Settings of the process's memory allocator."""

import ctypes
import platform

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MIB = 1 << 20


MOST_FREED = 128 * MIB
"""Freed memory that may lie between what is used; the system's figures of it are those of glibc from 2.33 on."""


class _Figures(ctypes.Structure):
    """What mallinfo2 tells, in bytes; `fordblks` is what is free within what glibc has."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def bound_freed_memory() -> None:
    """Return what was freed if it is more than MOST_FREED, to be called now and then within a part of the work.

    The threshold that glibc has is for what is free at the end of its memory alone.
    """
    if platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        return
    look = ctypes.CDLL(None).mallinfo2
    look.restype = _Figures
    if look().fordblks > MOST_FREED:
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Have glibc return all that was freed, when a part of the work is done whose needs are not those of the next."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Let glibc keep up to 256 MiB of freed memory for the next allocations.

    By default it keeps 64 MiB at most. The activations of one batch come and go many times in a layer, and each time
    the system would take their pages back and clear them anew: a tenth of the time of a walk.

    Returns:
        Whether it was done; other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Setting one parameter stops glibc from adapting the others: freed blocks of 17 MiB and more go back to the system.
    # Smaller blocks stay, such as the activations of small models. With a higher threshold a refit kept 700 MB of freed
    # blocks beside 300 MB in use: torch asks for aligned blocks, and the freed ones were just too small.
    settings = {M_MMAP_THRESHOLD: 17 * MIB, M_TRIM_THRESHOLD: 256 * MIB, M_TOP_PAD: 64 * MIB}
    done = [mallopt(parameter, value) for parameter, value in settings.items()]
    return all(done)
