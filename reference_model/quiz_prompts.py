"""Write calibration text in the quiz's format: solved prompts of the questions in `calib_data/quiz/dev`.

    python reference_model/quiz_prompts.py [--output calib_data/quiz_prompts.jsonl]

The questions of the test split, and their answers, are not looked at. The options of a question are drawn anew each
time, from all that the development rows of its subject offer: any of them that is not the answer is wrong (see
`build_quiz.py`).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from training_data import LETTERS, Row, description, read_rows

PROMPTS = 400
QUESTIONS = 8
DATA = Path(__file__).resolve().parent.parent / "calib_data"


def redrawn(row: Row, options: list[str], rng: random.Random) -> Row:
    """The question with three other options and its answer, in a random order."""
    drawn = rng.sample([option for option in options if option != row.answer], 3)
    place = rng.randrange(len(LETTERS))
    drawn.insert(place, row.answer)
    return Row(row.question, tuple(drawn), LETTERS[place])


def prompt(subject: str, dev: list[Row], rng: random.Random) -> str:
    """Solved questions of one subject, as lm-eval writes its examples; each comes up once before any does twice."""
    options = sorted({option for row in dev for option in row.options})
    rows: list[Row] = []
    while len(rows) < QUESTIONS:
        rows += rng.sample(dev, min(len(dev), QUESTIONS - len(rows)))
    solved = [redrawn(row, options, rng) for row in rows]
    return description(subject) + "".join(f"{row.prompt()} {row.letter}\n\n" for row in solved)


def prompts(quiz: Path) -> list[str]:
    """PROMPTS prompts, the subjects taking turns."""
    rng = random.Random(0)
    subjects = [(path.stem, read_rows(path)) for path in sorted((quiz / "dev").glob("*.csv"))]
    return [prompt(*subjects[number % len(subjects)], rng) for number in range(PROMPTS)]


def main() -> None:
    """Write the prompts, one a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DATA / "quiz_prompts.jsonl", help="file to write")
    output: Path = parser.parse_args().output
    lines = [json.dumps({"text": text}) + "\n" for text in prompts(DATA / "quiz")]
    output.write_text("".join(lines), encoding="utf-8")
    print(f"{output}: {len(lines)} prompts of {QUESTIONS} questions")


if __name__ == "__main__":
    main()
