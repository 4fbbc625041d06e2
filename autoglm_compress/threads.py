"""How idle threads wait for work."""

import os

SETTINGS = {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}
"""How often a thread of GNU's OpenMP looks for work before it sleeps (300,000 by default), and for how many
milliseconds one of LLVM's does (200 by default)."""


def sleep_soon() -> bool:
    """Have threads sleep soon after their work is done.

    By default they spin. Beside other work on the same cores, spinning takes time from the very threads that they wait
    for. A small model waits often and becomes several times slower. OpenMP reads these variables when it starts, so
    this is to be called before torch is imported.

    Returns:
        Whether the settings were changed. Values set by the user are kept.
    """
    if "OMP_WAIT_POLICY" in os.environ or not SETTINGS.keys().isdisjoint(os.environ):
        return False
    os.environ.update(SETTINGS)
    return True
