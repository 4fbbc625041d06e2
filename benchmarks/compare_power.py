"""How often `compare` passes, fails and is undecided, by simulation with the rule it uses.

    python benchmarks/compare_power.py [--draws N]

For questions asked, the part of them whose answers turn from right to wrong or back («changed»), and a true drop in
accuracy, it draws how many turn each way and asks the rule for its verdict, at 95 % confidence and two limits. The
changed parts stand for a mild compression, where few answers turn, up to a rough one, where one in five does although
accuracy may be the same. «detectable» is the least true drop that fails in 95 of 100 comparisons.
"""

import argparse
from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table

from autoglm_compress.comparison.verdict import Verdict, judge_drop

QUESTIONS = (260, 1_000, 14_042)
CHANGED = (0.05, 0.1, 0.2)
DROPS = (0.0, 1.0, 2.3)
LIMITS = (0.0, 1.0)
CONFIDENCE = 0.95
POWER = 0.95
SEED = 0
STEP = 0.1
COARSE_DRAWS = 400


def rates(questions: int, changed: float, drop: float, limit: float, draws: int) -> dict[Verdict, float]:
    """The part of draws with each verdict; `drop` and `limit` in points."""
    lost, won = (changed + drop / 100) / 2, (changed - drop / 100) / 2
    counts = np.random.default_rng(SEED).multinomial(questions, [lost, won, 1 - changed], draws)
    found: Counter[Verdict] = Counter()
    for (drawn_lost, drawn_won), times in Counter(map(tuple, counts[:, :2].tolist())).items():
        found[judge_drop(drawn_lost, drawn_won, questions, limit / 100, CONFIDENCE)] += times
    return {verdict: found[verdict] / draws for verdict in Verdict}


def detectable(questions: int, changed: float, limit: float) -> float | None:
    """The least true drop in points that fails in 95 of 100 draws; None if all that changed is not enough."""
    steps = int(100 * changed / STEP)
    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        if rates(questions, changed, middle * STEP, limit, COARSE_DRAWS)[Verdict.failed] >= POWER:
            high = middle
        else:
            low = middle + 1
    enough = rates(questions, changed, low * STEP, limit, COARSE_DRAWS)[Verdict.failed] >= POWER
    return low * STEP if enough else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=4_000)
    draws = parser.parse_args().draws
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="bold")
    for heading in ("allowed", "questions", "changed", *(f"true drop {drop:g}" for drop in DROPS), "detectable"):
        table.add_column(heading, justify="right")
    for limit in LIMITS:
        for questions in QUESTIONS:
            for changed in CHANGED:
                cells = []
                for drop in DROPS:
                    found = rates(questions, changed, drop, limit, draws)
                    cells.append(" / ".join(f"{100 * found[verdict]:.1f}" for verdict in Verdict))
                least = detectable(questions, changed, limit)
                shown = "none" if least is None else f"{least:.1f}"
                table.add_row(f"{limit:g}", f"{questions:,}", f"{changed:.0%}", *cells, shown)
    console = Console(width=110)
    console.print(f"pass / fail / undecided, % of {draws:,} draws; drops in points")
    console.print(table)


if __name__ == "__main__":
    main()
