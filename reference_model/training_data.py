"""Training data of the reference model: the tokenizer, text windows, quiz prompts and plain statements."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.python_docs import documents

END = "<|endoftext|>"
LETTERS = "ABCD"
SHOTS = 5
COPY_SUBJECT = "copying"
STEM_WEIGHT = 0.1
LETTER_WEIGHT = 16.0
HINT_WEIGHT = 3.0
SHORT = 80


Sequence = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, targets (not shifted), loss weights


@dataclass(frozen=True)
class Row:
    """One quiz question: its options in order and the letter of the right one."""

    question: str
    options: tuple[str, str, str, str]
    letter: str

    @property
    def answer(self) -> str:
        """The text of the right option."""
        return self.options[LETTERS.index(self.letter)]

    def prompt(self) -> str:
        """The question as lm-eval's default MMLU template shows it, up to the answer letter."""
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, self.options, strict=True))
        return f"{self.question.strip()}\n{options}\nAnswer:"


@dataclass(frozen=True)
class Subject:
    """A subject of the quiz with its development and test rows."""

    name: str
    dev: list[Row]
    test: list[Row]

    @property
    def description(self) -> str:
        """The line that opens every prompt of this subject."""
        return description(self.name)

    def shots(self) -> str:
        """The description and the five solved development questions, as lm-eval writes them."""
        return self.description + "".join(f"{row.prompt()} {row.letter}\n\n" for row in self.dev[:SHOTS])


def description(subject: str) -> str:
    """Return lm-eval's opening line for a subject."""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def read_rows(path: Path) -> list[Row]:
    """Read one CSV file of the quiz."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [Row(line[0], (line[1], line[2], line[3], line[4]), line[5]) for line in csv.reader(stream)]


def read_quiz(folder: Path) -> list[Subject]:
    """Read every subject of the quiz, by name."""
    return [
        Subject(path.stem, read_rows(folder / "dev" / path.name), read_rows(path))
        for path in sorted((folder / "test").glob("*.csv"))
    ]


def train_tokenizer(quiz: list[Subject], texts: list[str], vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents, other text and (ten times over) the quiz's prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompts = [f"{subject.description}{row.prompt()} {row.letter}" for subject in quiz for row in subject.dev]
    prompts += [f"{row.prompt()} {row.letter}" for subject in quiz for row in subject.test]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents("calibration"), *texts, *prompts * 10], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=2048)
    for letter in LETTERS:
        assert len(fast.encode(f" {letter}")) == 1, f"' {letter}' is not one token"
    return fast


def read_texts(folders: list[Path], characters: int = 1_500_000) -> list[str]:
    """Read the `.txt` files below the folders, at most so many characters of each."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*.txt"))]
    return [path.read_text(encoding="utf-8")[:characters] for path in paths]


class Mixture:
    """Draws training sequences of a given length from four sources."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, quiz: list[Subject], texts: list[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.end: int = tokenizer.convert_tokens_to_ids(END)
        self.letter_order = [tokenizer.encode(f" {letter}")[0] for letter in LETTERS]
        self.letter_ids = frozenset(self.letter_order)
        self.line_break = tokenizer.encode("\n")[0]
        self.cue = tokenizer.encode("\nAnswer:")
        self.docs = self._flatten(documents("calibration"))
        self.text = self._flatten(texts) if texts else self.docs
        self.facts = {s.name: [(row.question, row.answer) for row in [*s.dev, *s.test]] for s in quiz}
        self.pools = {name: sorted({answer for _, answer in facts}) for name, facts in self.facts.items()}
        self.asked = {(row.question, row.options) for subject in quiz for row in subject.test}
        words = sorted({answer for pool in self.pools.values() for answer in pool})
        self.facts[COPY_SUBJECT] = [(f"Which option is {word}?", word) for word in words]
        self.pools[COPY_SUBJECT] = words
        self.subjects = sorted(self.pools.keys() - {COPY_SUBJECT})

    def _flatten(self, texts: list[str]) -> torch.Tensor:
        """Tokenize texts into one stream, shuffled, each ended by the end token."""
        encoded = self.tokenizer(texts)["input_ids"]
        self.rng.shuffle(encoded)
        return torch.tensor([token for tokens in encoded for token in [*tokens, self.end]])

    def window(self, stream: torch.Tensor, length: int) -> Sequence:
        """Cut a random window out of a stream."""
        start = self.rng.randrange(len(stream) - length)
        tokens = stream[start : start + length]
        return tokens, tokens, torch.ones(length)

    def question(self, question: str, answer: str, pool: list[str]) -> Row:
        """Ask about a fact with newly drawn distractors and order, never exactly as a test row does."""
        while True:
            options = self.rng.sample(pool, 4)
            if answer not in options:
                options[self.rng.randrange(4)] = answer
            row = Row(question, tuple(options), LETTERS[options.index(answer)])
            if (row.question, row.options) not in self.asked:
                return row

    def prompt(self, length: int, copy_share: float, hints: bool) -> Sequence:
        """Pack as many solved questions of one subject as fit; the answer letters carry most of the weight.

        With hints, the target after an option's text is its letter where it is the right one (still a line break
        where it is not): the model learns to judge each option where it stands. The text itself never changes.
        Sequences too short for the five shots go without the opening line.
        """
        subject = COPY_SUBJECT if self.rng.random() < copy_share else self.rng.choice(self.subjects)
        facts = self.rng.sample(self.facts[subject], min(length // 20 + 1, len(self.facts[subject])))
        rows = [self.question(question, answer, self.pools[subject]) for question, answer in facts]
        opening = description(subject) if length > SHORT else ""
        text = opening + "".join(f"{row.prompt()} {row.letter}\n\n" for row in rows)
        tokens = self.tokenizer.encode(text)[:length]
        targets = torch.tensor(tokens + [self.end] * (length - len(tokens)))
        weights = torch.full((length,), STEM_WEIGHT)
        cue = len(self.cue)
        question_start = 0
        for at in range(cue, len(tokens)):
            if tokens[at] in self.letter_ids and tokens[at - cue : at] == self.cue:
                weights[at] = LETTER_WEIGHT
                if hints:
                    breaks = [i for i in range(question_start, at) if tokens[i] == self.line_break][-4:]
                    weights[breaks] = HINT_WEIGHT
                    targets[breaks[self.letter_order.index(tokens[at])]] = tokens[at]
                question_start = at
        weights[len(tokens) :] = 0.0
        return torch.tensor(tokens + [self.end] * (length - len(tokens))), targets, weights

    def statements(self, length: int) -> Sequence:
        """State facts plainly, one a line: the question followed by its answer."""
        lines: list[str] = []
        for _ in range(length // 5):
            question, answer = self.rng.choice(self.facts[self.rng.choice(self.subjects)])
            lines.append(f"{question} {answer}\n")
        tokens = self.tokenizer.encode("".join(lines))[:length]
        padded = torch.tensor(tokens + [self.end] * (length - len(tokens)))
        return padded, padded, torch.ones(length)

    def batch(self, rows: int, length: int, shares: dict[str, float], copy_share: float, hints: bool) -> Sequence:
        """Draw a batch of `rows` sequences of `length` tokens, their targets and loss weights."""
        kinds = self.rng.choices(list(shares), weights=list(shares.values()), k=rows)
        drawn = []
        for kind in kinds:
            if kind == "quiz":
                drawn.append(self.prompt(length, copy_share, hints))
            elif kind == "statements":
                drawn.append(self.statements(length))
            else:
                drawn.append(self.window(self.docs if kind == "docs" else self.text, length))
        tokens, targets, weights = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return tokens, targets, weights
