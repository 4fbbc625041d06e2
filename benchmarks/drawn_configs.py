"""Configurations drawn by the hundred: has each the logits that plain transformers has of it, or a refusal?

    python benchmarks/drawn_configs.py [--draws 500] [--seed 0] [--output FILE.json]

Half of the models are just as `save_pretrained` leaves them and must pass. The others are edited by one to three
changes and may be refused. Exit code 1 if logits are wrong, something else than a refusal is raised, or an unedited
model does not pass.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from chains import ROOT, write_results
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from transformers import logging as transformers_logging

sys.path.insert(0, str(ROOT / "tests"))  # where the models that the tests draw are described

from support.drawn_models import CONTEXT, DrawnModel, drawn_models
from support.evaluating import make_tokenizer
from support.own_logits import PASS, REFUSED, UNLOADED, WRONG, Outcome, outcome

KINDS = (PASS, REFUSED, UNLOADED, WRONG)


def outcome_of(drawn: DrawnModel) -> Outcome:
    """Build a model in a folder that is then gone; anything else than a refusal is WRONG."""
    with tempfile.TemporaryDirectory() as name:
        try:
            folder = drawn.build(Path(name) / "model")
            make_tokenizer().save_pretrained(folder)
            return outcome(folder, Path(name) / "work", CONTEXT)
        except Exception as error:
            return Outcome(WRONG, f"{type(error).__name__}: {' '.join(str(error).split())}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    found: list[dict[str, Any]] = []
    for edits in (0, 3):
        run_draws(drawn_models(edits=edits), options.draws // 2, options.seed, found)
    show(found)
    not_passed = [row for row in found if row["outcome"] != PASS]
    if options.output:
        write_results(options.output, {"seed": options.seed, "counts": counts(found), "not_passed": not_passed})
    bad = [row for row in found if row["outcome"] == WRONG or (not row["edits"] and row["outcome"] == REFUSED)]
    sys.exit(1 if bad else 0)


def run_draws(strategy: st.SearchStrategy[DrawnModel], draws: int, number: int, found: list[dict[str, Any]]) -> None:
    """Draw models and append what became of each."""

    @seed(number)
    @settings(
        max_examples=draws,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(drawn: DrawnModel) -> None:
        result = outcome_of(drawn)
        row = {"family": drawn.family, "edits": [repr(edit) for edit in drawn.edits], "outcome": result.kind}
        if result.kind != PASS:
            row |= {"reason": result.reason}
        if result.kind == WRONG:
            row |= {"model": repr(drawn)}
        found.append(row)

    one()


def counts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes by family, unedited and edited apart, and refusals by reason."""
    by_family: dict[str, Counter[str]] = {}
    for row in found:
        name = f"{row['family']}, {'edited' if row['edits'] else 'unedited'}"
        by_family.setdefault(name, Counter())[row["outcome"]] += 1
    reasons = Counter(kind_of(row["reason"]) for row in found if row["outcome"] in (REFUSED, UNLOADED))
    return {"by_family": {name: dict(by_family[name]) for name in sorted(by_family)}, "reasons": dict(reasons)}


def kind_of(reason: str) -> str:
    """A refusal without the numbers and names that were drawn."""
    line = " ".join(reason.split())[:160]
    return re.sub(r"\d+", "N", line)


def show(found: list[dict[str, Any]]) -> None:
    console = Console()
    table = Table("", *KINDS, title=f"{len(found)} configurations")
    counted = counts(found)
    for name, outcomes in counted["by_family"].items():
        table.add_row(name, *(str(outcomes.get(kind, 0)) for kind in KINDS))
    console.print(table)
    for reason, count in sorted(counted["reasons"].items(), key=lambda entry: -entry[1]):
        console.print(f"{count:4} {reason}", soft_wrap=True, markup=False)
    for row in found:
        if row["outcome"] == WRONG:
            console.print(json.dumps(row), soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
