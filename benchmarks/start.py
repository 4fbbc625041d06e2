"""How long the command line and the package take before any work: `--help`, and `import autoglm_compress`.

    python benchmarks/start.py [--times 11]

Each is a new process; the median counts, of wall-clock and of CPU seconds. `import torch` is there for comparison.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from chains import write_results
from rich.console import Console
from rich.table import Table

STARTS = {
    "python -c pass": ("-c", "pass"),
    "import autoglm_compress": ("-c", "import autoglm_compress"),
    "autoglm-compress --help": ("-m", "autoglm_compress", "--help"),
    "autoglm-compress recipes": ("-m", "autoglm_compress", "recipes"),
    "from autoglm_compress import run": ("-c", "from autoglm_compress import run"),
    "import torch": ("-c", "import torch"),
}


def seconds(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one process."""
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=11)
    parser.add_argument("--output", type=Path, default=Path("runs/start.json"))
    arguments = parser.parse_args()
    table, rows = Table("", "seconds", "CPU seconds", box=None), {}
    for name, command in STARTS.items():
        seconds(command)  # reads the files into memory
        wall, cpu = zip(*(seconds(command) for _ in range(arguments.times)), strict=True)
        rows[name] = {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu)}
        table.add_row(name, *(f"{value:.2f}" for value in rows[name].values()))
    Console().print(table, highlight=False)
    write_results(arguments.output, rows)


if __name__ == "__main__":
    main()
