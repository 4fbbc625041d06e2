"""Healing against a plain Hugging Face Trainer with the same loss: tokens per second and peak memory, in one run.

    python benchmarks/healing_throughput.py [--steps 20] [--output DIR]

Both train all weights of a copy of the teacher with AdamW by forward KL on the teacher's logits, on the same rows, in
the same precision. The embedded model has a vocabulary of 4,096 tokens, the other one, with random weights, of 151,552.
Each side runs in a process of its own; the first two steps do not count.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from chains import REFERENCE, write_results
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM, TrainingArguments
from transformers import Trainer as PlainTrainer

from autoglm_compress import Checkpoint
from autoglm_compress.calibration.training_rows import TrainingRows
from autoglm_compress.forward.one_layer_model import fast_dtype
from autoglm_compress.forward.whole_model import load_model
from autoglm_compress.healing.model import Student
from autoglm_compress.healing.options import HealingOptions
from autoglm_compress.healing.teacher import ResidentTeacher
from autoglm_compress.healing.trainer import Check, Trainer
from autoglm_compress.progress import Progress
from autoglm_compress.runtime import Runtime

ROWS, LENGTH = 8, 256
WARM_UP = 2
CPU = torch.device("cpu")


def wide_vocabulary(folder: Path) -> None:
    """A random model of two layers with as many tokens as GLM-4 has."""
    config = GlmConfig(
        vocab_size=151_552,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        pad_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    GlmForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)


def rows_for(checkpoint: Checkpoint, steps: int) -> torch.Tensor:
    """Token ids that mean nothing."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(checkpoint.shape.vocab_size, (ROWS * steps, LENGTH), generator=generator)


class Clock:
    """When steps ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        return self.ends[-1] - self.ends[WARM_UP - 1]


class TimedTrainer(Trainer):
    """Ours, timed, without the checks that the other side does not make."""

    clock: Clock

    def _train_step(self) -> float:
        loss = super()._train_step()
        self.clock.step()
        return loss

    def _check(self) -> None:
        self.checks.append(Check(self.step, 0, 1.0))


def run_ours(checkpoint: Checkpoint, steps: int, work: Path) -> Clock:
    """The loop of the `heal` stage."""
    fast = fast_dtype(checkpoint, CPU)
    model = load_model(checkpoint, CPU, torch.float32)
    student = Student(model, checkpoint, lambda: torch.autocast("cpu", fast, enabled=fast != torch.float32))
    data = TrainingRows(rows_for(checkpoint, steps), torch.arange(ROWS * steps), torch.arange(1))
    options = HealingOptions(tokens=ROWS * LENGTH * steps, batch_size=ROWS, checks=1)
    teacher = ResidentTeacher(checkpoint, CPU, None)
    trainer = TimedTrainer(student, student, teacher, data, options, work, Runtime(CPU, Progress(Console(quiet=True))))
    trainer.clock = Clock()
    trainer.run()
    return trainer.clock


class Distiller(PlainTrainer):
    """What most people write: the KL of all logits at once."""

    def __init__(self, teacher: torch.nn.Module, clock: Clock, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.clock = teacher, clock

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        rows = inputs["input_ids"]
        with torch.no_grad():
            expected = self.teacher(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        found = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        return torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.clock.step()
        return loss


def run_plain(checkpoint: Checkpoint, steps: int, work: Path) -> Clock:
    """transformers' Trainer."""
    clock, fast = Clock(), fast_dtype(checkpoint, CPU)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=ROWS,
        max_steps=steps,
        bf16=fast == torch.bfloat16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row} for row in rows_for(checkpoint, steps)]
    teacher = load_model(checkpoint, CPU, fast).requires_grad_(False)
    Distiller(
        teacher, clock, model=load_model(checkpoint, CPU, torch.float32), args=arguments, train_dataset=dataset
    ).train()
    return clock


SIDES = {"ours": run_ours, "transformers Trainer": run_plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-healing-throughput"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        with tempfile.TemporaryDirectory() as work:
            clock = SIDES[arguments.side](Checkpoint(arguments.model), arguments.steps, Path(work))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tokens = ROWS * LENGTH * (arguments.steps - WARM_UP)
        print(json.dumps({"tokens_per_second": tokens / clock.seconds(), "peak_rss_bytes": peak}))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    wide = arguments.output / "wide-vocabulary"
    if not wide.exists():
        wide_vocabulary(wide)
    found: dict[str, dict[str, Any]] = {}
    table = Table("model", "", "tokens/s", "peak memory", box=None)
    for name, model in {"embedded model": REFERENCE, "2 layers x 512, 151,552 tokens": wide}.items():
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--model", str(model), "--steps", str(arguments.steps)]
            result = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            found.setdefault(name, {})[side] = result
            table.add_row(
                name, side, f"{result['tokens_per_second']:.0f}", f"{result['peak_rss_bytes'] / 2**30:.2f} GiB"
            )
        ours, plain = (found[name][side] for side in SIDES)
        speed = ours["tokens_per_second"] / plain["tokens_per_second"]
        memory = ours["peak_rss_bytes"] / plain["peak_rss_bytes"]
        table.add_row(name, "ratio", f"{speed:.2f}x", f"{memory:.2f}x")
    Console(width=120).print(table, highlight=False)
    write_results(arguments.output / "healing_throughput.json", found | {"steps": arguments.steps})


if __name__ == "__main__":
    main()
