"""Healing beside busy neighbours, by how threads wait: tokens per second of the embedded model.

    python benchmarks/threads.py --neighbours 0 2 --tokens 15000 --output benchmarks/results/threads.json

Each way is a process of its own; neighbours are processes that do nothing but count. `spinning` is what OpenMP does by
default, `ours` what the command line sets, `one thread` does not wait for others at all.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "spinning": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    "ours": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
COUNTING = "while True: sum(range(100_000))"
RATE = re.compile(r"healing.*?([\d.]+)(k?) tokens/s")


def recipe(folder: Path, tokens: int) -> Path:
    """Heals the embedded model without four of its layers."""
    stages = [
        {"stage": "depth", "layers": [*range(4), *range(8, 12)]},
        {"stage": "heal", "tokens": tokens, "batch_size": 8, "checks": 1},
    ]
    file = folder / "recipe.yaml"
    data = {"name": "threads", "model": {"source": str(ROOT / "reference_model" / "checkpoint")}, "stages": stages}
    data |= {"calibration": {"samples": 8, "sequence_length": 256}, "evaluation": {"every_stage": []}}
    file.write_text(yaml.safe_dump(data))
    return file


def tokens_per_second(folder: Path, tokens: int, settings: dict[str, str]) -> float:
    """The rate that the last line of progress shows."""
    folder.mkdir(parents=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [
        sys.executable,
        "-m",
        "autoglm_compress",
        "run",
        str(recipe(folder, tokens)),
        "--output",
        str(folder / "out"),
    ]
    shown = subprocess.run(command, env=clean | settings, capture_output=True, text=True, check=True).stdout
    number, thousand = RATE.findall(" ".join(shown.split()))[-1]
    return float(number) * (1000 if thousand else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 2], help="busy processes beside it")
    parser.add_argument("--tokens", type=int, default=15_000, help="to heal on")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    table = Table("neighbours", *WAYS, "ours / spinning", box=None)
    found = []
    for count in arguments.neighbours:
        neighbours = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(count)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                rates = {
                    way: tokens_per_second(Path(folder) / way.replace(" ", "-"), arguments.tokens, settings)
                    for way, settings in WAYS.items()
                }
        finally:
            for neighbour in neighbours:
                neighbour.kill()
        found.append({"neighbours": count, "cores": os.cpu_count(), "tokens_per_second": rates})
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=2) + "\n")
        ratio = rates["ours"] / rates["spinning"]
        table.add_row(str(count), *(f"{rate:.0f}" for rate in rates.values()), f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
