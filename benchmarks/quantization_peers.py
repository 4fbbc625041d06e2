"""Quantization against llm-compressor's AWQ and AutoAWQ: time, memory and quality on the same tokens.

    python benchmarks/quantization_peers.py --output runs/benchmark-quantization [--model FOLDER] [--tokens 65536]
        [--llama-layers 8 --llama-width 512] [--settings int4-g128 int8] [--sides ours llm-compressor]

Every side quantizes the model in a process of its own on the CPU, with as many threads as torch takes here
(OMP_NUM_THREADS sets them) and with its own defaults but for the setting. The peers are handed the model in fp32
where the CPU has no instructions for bf16, as our walk computes there (`peer_dtype` in the results). Each peer has a
virtual environment, made on first use in OUTPUT/environments. `quantize` are the seconds from one checkpoint to the
next: reading, searching, rounding and writing; `process` those of the whole process with interpreter, imports and, for
ours, tokenizing. The peak is that of the process. Then each side's own code brings its result to plain weights, and one
routine measures them all in fp32 on held-out text. --llama-layers quantizes random weights instead, for time and memory
alone.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from chains import REFERENCE, ROOT, write_results
from environments import environment
from peers.quality import build, compare, stored
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autoglm_compress import Checkpoint, load_recipe
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.run_text import CalibrationText, find_sources
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.forward.one_layer_model import fast_dtype
from autoglm_compress.progress import Progress

WORKERS = Path(__file__).resolve().parent / "peers"
LENGTH = 512
HELD_OUT_ROWS = 32
TEXT = "python-docs"

INSTALL: dict[str, list[list[str]]] = {
    "llm-compressor": [
        ["llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0", "torch==2.13.0"],
    ],
    # AutoAWQ asks for triton, which only a GPU needs.
    "autoawq": [
        ["--constraint", str(ROOT / "constraints.txt"), "--editable", str(ROOT), "accelerate==1.15.0", "zstandard"],
        ["--no-deps", "autoawq==0.2.9"],
    ],
}
"""What pip is given to make each peer's environment, call by call."""

WORKER = {"llm-compressor": "quantize_llm_compressor.py", "autoawq": "quantize_autoawq.py"}
ORIGINAL, OURS = "16-bit", "ours"
OUR_SIDES: dict[str, dict[str, Any]] = {
    "round to nearest": {"method": "round_to_nearest"},
    "ours, plain AWQ": {"error_feedback": False},
    OURS: {},
    "ours, zero points": {"format": "awq"},
}
"""What each of our sides adds to a setting; without zero points ours are symmetric."""
SIDES = (ORIGINAL, *OUR_SIDES, *WORKER)


@dataclass(frozen=True)
class Setting:
    """What all sides are asked for; `symmetric` is the peers'."""

    bits: int
    group_size: int
    symmetric: bool

    def stage(self) -> dict[str, Any]:
        """The options of our stage."""
        return {"stage": "quantize", "bits": self.bits, "group_size": self.group_size}

    def suits(self, side: str) -> bool:
        """Whether a side can do it."""
        return self.bits == 4 and not self.symmetric if side in ("autoawq", "ours, zero points") else True


SETTINGS = {
    "int4-g128": Setting(4, 128, symmetric=False),
    "int4-g64": Setting(4, 64, symmetric=False),
    "int4-g32": Setting(4, 32, symmetric=False),
    "int4-g128-symmetric": Setting(4, 128, symmetric=True),
    "int8": Setting(8, 128, symmetric=True),
}


@torch.no_grad()
def make_llama(folder: Path, layers: int, width: int) -> Path:
    """A Llama-shaped checkpoint of random weights with the reference model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(path: Path, model: Path, samples: int, length: int, stage: dict[str, Any]) -> Path:
    """A recipe that quantizes and does no more."""
    recipe = {
        "name": "quantization-peers",
        "model": {"source": str(model.resolve())},
        "calibration": {"source": TEXT, "samples": samples, "sequence_length": length},
        "stages": [stage | {"name": "quantized"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def rows_of(recipe: Path, model: Path) -> torch.Tensor:
    """The rows of tokens [samples, length] that our stage calibrates on."""
    loaded = load_recipe(recipe)
    files = find_sources(loaded.calibration, loaded.bases)
    return torch.cat(CalibrationText(loaded.calibration, files, Checkpoint(model), Progress(Console())).batches)


def versions() -> dict[str, list[str]]:
    """The pinned packages of each environment."""
    return {peer: [package for call in calls for package in call if "==" in package] for peer, calls in INSTALL.items()}


def run_process(folder: Path, name: str, command: list[str | Path]) -> dict[str, Any]:
    """What a command took, run on the CPU by itself; its output goes to FOLDER/NAME.log."""
    report, log = folder / f"{name}.json", folder / f"{name}.log"
    variables = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    measured = [sys.executable, WORKERS / "measured.py", report, *command]
    with log.open("w") as output:
        if subprocess.run(measured, stdout=output, stderr=subprocess.STDOUT, env=variables).returncode:
            raise RuntimeError(f"{name} failed, see {log.relative_to(folder.parents[1])}")
    return json.loads(report.read_text())


@dataclass(frozen=True)
class Benchmark:
    """One model and its tokens, for all sides and settings."""

    output: Path
    model: Path
    rows: torch.Tensor
    held_out: torch.Tensor

    @property
    def peer_dtype(self) -> str:
        """What the peers compute in: that of our own walk, for without instructions for it bf16 takes 60 times fp32."""
        return str(fast_dtype(Checkpoint(self.model), torch.device("cpu"))).removeprefix("torch.")

    def row(self, side: str, setting_name: str) -> dict[str, Any]:
        """Quantize with one side, and measure the result."""
        original = stored(self.model)
        tensors, cost = original, {}
        if side != ORIGINAL:
            folder = self.output / setting_name / side.replace(",", "").replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            quantize = self._quantize_by_peer if side in WORKER else self._quantize_by_us
            load, cost = quantize(folder, side, SETTINGS[setting_name])
            tensors = load()
        return cost | compare(build(self.model, original), build(self.model, tensors), self.held_out)

    def _quantize_by_us(self, folder: Path, side: str, setting: Setting) -> tuple[Callable[[], Any], dict[str, Any]]:
        stage = setting.stage() | OUR_SIDES[side]
        recipe = write_recipe(folder / "recipe.yaml", self.model, *self.rows.shape, stage)
        command = [sys.executable, "-m", "autoglm_compress", "run", recipe, "--output", folder / "run", "--fresh"]
        process = run_process(folder, "quantize", command)
        seconds = json.loads((folder / "run" / "metrics.json").read_text())["stages"][-1]["seconds"]
        return lambda: stored(folder / "run" / "01-quantized"), process | {"quantize_seconds": seconds}

    def _quantize_by_peer(self, folder: Path, side: str, setting: Setting) -> tuple[Callable[[], Any], dict[str, Any]]:
        python = environment(self.output / "environments" / side, INSTALL[side])
        rows = folder / "rows.safetensors"
        save_file({"rows": self.rows.contiguous()}, rows)
        worker = WORKERS / WORKER[side]
        options = json.dumps(asdict(setting) | {"dtype": self.peer_dtype})
        process = run_process(
            folder, "quantize", [python, worker, "quantize", self.model.resolve(), rows, options, folder]
        )
        run_process(folder, "dequantize", [python, worker, "dequantize", folder])
        seconds = json.loads((folder / "seconds.json").read_text())
        return lambda: load_file(folder / "dense.safetensors"), process | {"quantize_seconds": seconds}


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Cost and quality of every side, and their ratios to ours."""
    ours = rows.get(OURS, {})
    headings = ("quantize", "x ours", "process", "peak", "x ours", "perplexity", "KL", "x ours", "top-1")
    table = Table("", *headings, box=None)
    for side, row in rows.items():
        if "error" in row:
            table.add_row(side, "failed")
            continue
        cells = [""] * 5
        if "seconds" in row:
            cells = [
                f"{row['quantize_seconds']:.1f}s",
                ratio(row, ours, "quantize_seconds"),
                f"{row['seconds']:.1f}s",
                f"{row['peak_rss_bytes'] / 2**20:.0f} MiB",
                ratio(row, ours, "peak_rss_bytes"),
            ]
        quality = [f"{row['perplexity']:.3f}", f"{row['kl']:.5f}", ratio(row, ours, "kl"), f"{100 * row['top1']:.1f}%"]
        table.add_row(side, *cells, *quality)
    console = Console(width=140)
    console.print(f"\n{title}", highlight=False, style="bold")
    console.print(table, highlight=False)
    for side, row in rows.items():
        if "error" in row:
            console.print(f"{side}: {row['error']}", highlight=False, soft_wrap=True)


def ratio(row: dict[str, Any], ours: dict[str, Any], field: str) -> str:
    """A field as a multiple of ours."""
    return f"{row[field] / ours[field]:.2f}" if ours.get(field) and row[field] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--llama-layers", type=int, help="quantize random weights of so many layers instead")
    parser.add_argument("--llama-width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=65_536, help="to calibrate on")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["int4-g128", "int4-g32", "int8"])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quantization"))
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    model = arguments.model
    if arguments.llama_layers:
        folder = output / f"llama-{arguments.llama_layers}x{arguments.llama_width}"
        model = make_llama(folder, arguments.llama_layers, arguments.llama_width)
    length = min(LENGTH, arguments.tokens // 8)
    stage = SETTINGS[arguments.settings[0]].stage()
    recipe = write_recipe(output / "recipe.yaml", model, arguments.tokens // length, length, stage)
    held_out = token_rows(Reader(Checkpoint(model).tokenizer()), None, "held-out", HELD_OUT_ROWS, length, seed=0)
    benchmark = Benchmark(output, model, rows_of(recipe, model), held_out)
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.settings:
        found[name] = {}
        for side in arguments.sides:
            if not SETTINGS[name].suits(side):
                continue
            try:
                found[name][side] = benchmark.row(side, name)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                found[name][side] = {"error": str(error)}
            write_results(
                output / f"quantization_peers-{model.name}.json",
                {
                    "model": model.name,
                    "calibration_rows": list(benchmark.rows.shape),
                    "held_out_rows": list(held_out.shape),
                    "threads": torch.get_num_threads(),
                    "peer_dtype": benchmark.peer_dtype,
                    "settings": {name: asdict(SETTINGS[name]) for name in found},
                    "versions": versions(),
                    "rows": found,
                },
            )
        print_table(f"{model.name}, {name}, {benchmark.rows.numel()} tokens", found[name])


if __name__ == "__main__":
    main()
