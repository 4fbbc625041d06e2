"""Draw screens of a phone, and write them with tasks and right actions as rows for calibration.

    python screens/draw_screens.py [--output calib_data] [--rows 240] [--seed 0]

`phone_screens.jsonl` has a chat a row: the screen and the task, then the action in the format of AutoGLM-Phone. Its
images are in `phone_screens/`. The same seed, pillow and FreeType give the same bytes. Needs pillow and PyYAML.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from screen_kinds import KINDS, LANGUAGES, Step, Writer

HERE = Path(__file__).resolve().parent
NAME = "phone_screens"


@cache
def words() -> dict[str, Any]:
    """What the screens say."""
    return yaml.safe_load((HERE / "words.yaml").read_text(encoding="utf-8"))


def one(seed: int | str, kind: int, language: int) -> Step:
    """A screen of a kind in a language, by their numbers."""
    return KINDS[kind](Writer(random.Random(seed), language, words()))


def row(system: str, step: Step, image: str) -> dict[str, Any]:
    """A step as a chat: the image first, then the task and the app that is open, as the agent is given them."""
    asked = f"{step.task}\n\n{json.dumps({'current_app': step.app}, ensure_ascii=False)}"
    content = [{"type": "image", "path": image}, {"type": "text", "text": asked}]
    answer = f"<think>{step.reason}</think><answer>{step.action}</answer>"
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


def write(output: Path, rows: int, seed: int) -> None:
    """Write the rows and their images into a folder."""
    (output / NAME).mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):  # both languages, and all kinds, by turns
        language, kind = number % len(LANGUAGES), number // len(LANGUAGES) % len(KINDS)
        step, system = one(f"{seed}-{number}", kind, language), words()["system"][LANGUAGES[language]]
        image = f"{NAME}/{number:03d}.png"
        step.canvas.reduced().save(output / image, optimize=True)
        lines.append(json.dumps(row(system, step, image), ensure_ascii=False) + "\n")
    (output / f"{NAME}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "calib_data")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.output, arguments.rows, arguments.seed)


if __name__ == "__main__":
    main()
