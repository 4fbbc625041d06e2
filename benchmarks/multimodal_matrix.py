"""Every family with towers beside its text through every stage: what comes out, for rows of text, images and sounds.

    OMP_NUM_THREADS=1 python benchmarks/multimodal_matrix.py [--families glm4v …] [--output FILE.json]

Tiny random models, in plain transformers in fp32. A checkpoint passes if no key is missing or unexpected and its logits
are finite, and differ for another image or sound. Of stages that keep all there is, `error` is
the largest difference of a logit from the source's; of those that cut, `change` is the norm of the difference to the
checkpoint before over that one's logits.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from chains import ROOT, write_results
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForMultimodalLM
from transformers import logging as transformers_logging

sys.path.insert(0, str(ROOT / "tests"))  # where the models are described

from support.evaluating import make_tokenizer
from support.multimodal import FAMILIES, family_of, logits, media_rows, save, stages_of, text_row
from support.running import run, write_recipe

KEPT: dict[str, dict[str, Any]] = {
    "depth": {"num_hidden_layers": "1x"},
    "ffn": {"intermediate_size": "1x"},
    "heads": {"num_attention_heads": "1x"},
    "width": {"hidden_size": "1x"},
}
"""Stages that keep all there is."""


def recipe_stages(name: str) -> list[dict[str, Any]]:
    """All stages in a chain, and each of KEPT from the source."""
    derives = family_of(name).transformers_derives_head_dim
    kept = [
        {"stage": stage, "name": f"all-{stage}", "from": "source"}
        | options
        | ({"num_attention_heads": "1x"} if derives and stage == "width" else {})
        for stage, options in KEPT.items()
        if not (derives and stage == "heads")
    ]
    return stages_of(name)[1:] + kept  # the first keeps all layers, as the first of KEPT does


def answers(checkpoint: Path, name: str) -> tuple[int, list[torch.Tensor]]:
    """The number of keys that are missing or unexpected, and logits of text, each kind of media, and others of each."""
    model, info = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    rows = [text_row(), *media_rows(name), *media_rows(name, seed=1)]
    return sum(map(len, info.values())), [logits(model.eval(), row) for row in rows]


def results_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """What every stage makes of a family's model."""
    source = save(name, folder / "source", make_tokenizer())
    stages = recipe_stages(name)
    run(write_recipe(folder, source, stages))
    kinds = len(media_rows(name))
    _, original = answers(source, name)
    before, found = original, []
    for stage in (stage for stage in stages if stage["stage"] != "evaluate"):
        label = stage.get("name", stage["stage"])
        [checkpoint] = (folder / "out").glob(f"[0-9][0-9]-{label}")
        bad, logits_now = answers(checkpoint, name)
        text, media, others = logits_now[:1], logits_now[1 : 1 + kinds], logits_now[1 + kinds :]
        row = {
            "stage": label,
            "bad_keys": bad,
            "finite": all(bool(part.isfinite().all()) for part in logits_now),
            "media_matter": min(float((a - b).abs().max()) for a, b in zip(media, others, strict=True)),
        }
        whole = label.startswith("all-")
        against = original if whole else before
        for kind, now, then in (("text", text, against[:1]), ("media", media, against[1 : 1 + kinds])):
            pairs = list(zip(now, then, strict=True))
            row[kind] = (
                max(float((a - b).abs().max()) for a, b in pairs)
                if whole
                else max(float((a - b).norm() / b.norm()) for a, b in pairs)
            )
        found.append(row)
        if not whole and label != "int8":  # INT4 is made from what INT8 is made from
            before = logits_now
    return found


def passes(row: dict[str, Any]) -> bool:
    """Whether a checkpoint loads whole, is finite, and sees or hears."""
    return not row["bad_keys"] and row["finite"] and row["media_matter"] > 1e-3


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each stage: `text / media` of each family, ! where a checkpoint does not pass."""
    labels = list(dict.fromkeys(row["stage"] for rows in results.values() for row in rows))
    table = Table("stage", *results, box=None)
    for label in labels:
        cells = []
        for rows in results.values():
            row = next((row for row in rows if row["stage"] == label), None)
            if row is None:
                cells.append("-")
                continue
            cells.append(
                " / ".join(_shown(label, row[kind]) for kind in ("text", "media")) + ("" if passes(row) else " !")
            )
        table.add_row(label, *cells)
    Console(width=200).print(table, highlight=False)


def _shown(label: str, value: float) -> str:
    return f"{value:.1g}" if label.startswith("all-") else f"{100 * value:.1f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-multimodal-matrix/multimodal_matrix.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = results_of(name, Path(folder))
        write_results(arguments.output, results)
    print_table(results)
    bad = [f"{name} {row['stage']}" for name, rows in results.items() for row in rows if not passes(row)]
    sys.exit(f"did not pass: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
