"""Our GGUF files beside llama.cpp's own, at the same bits: convert to F16, then `llama_model_quantize`.

    python benchmarks/gguf_peers.py [--models smollm2-cut reference] [--data FILE] [--output DIR]

`smollm2-cut` is SmolLM2-135M without a tenth of its FFN, refitted: the weights of the package lie on a 4-bit grid, and
those do not. `reference` is the embedded model. llama.cpp quantizes the same F16 file, which is proven equal to the
checkpoint, to several types, with and without an importance matrix: the mean squares of the linears' inputs on the
calibration text of our stage, as llama-imatrix takes them. xllamacpp has no quantization, so llama-cpp-python is built
from source in an environment of its own, which takes minutes. Then xllamacpp runs every file on held-out text, and its
predictions are compared with those of the checkpoint before quantization. A run with other choices adds to the results.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from chains import REFERENCE, write_results
from environments import environment
from gguf import GGUFReader, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from rich.console import Console
from rich.table import Table
from smollm2 import make_smollm2
from transformers import AutoModelForCausalLM

from autoglm_compress import Checkpoint, load_recipe, run
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.run_text import CalibrationText, find_sources
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.figures import LINES, as_svg, log_axis, new_figure
from autoglm_compress.progress import Progress

WORKERS = Path(__file__).resolve().parent / "engines"
LLAMA_CPP_PYTHON = [["llama-cpp-python==0.3.36"]]
CALIBRATION_ROWS, HELD_OUT_ROWS, LENGTH = 16, 4, 512
TYPES = {
    "Q4_0": ["2"],
    "Q4_0 with Q8_0 ends": ["2", "8"],
    "Q4_1": ["3"],
    "Q4_K_M": ["15"],
    "Q5_0": ["8"],
    "Q5_K_M": ["17"],
    "Q8_0": ["7"],
}
"""llama.cpp's numbers for what it quantizes to, and for the type of embedding and head if it does not choose that."""
OURS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4},
    "int8": {"bits": 8},
    "zero-points": {"bits": 4, "format": "awq"},
    "mixed": {"bits": "auto", "budget": {"average_bits": 5.5}},
}
"""What our stage quantizes to, in groups of 32 as llama.cpp's are."""
MODELS: dict[str, tuple[Callable[[Path], Path], list[dict[str, Any]]]] = {
    "smollm2-cut": (
        lambda output: make_smollm2(output / "smollm2"),
        [
            {"stage": "ffn", "intermediate_size": 1376},
            {"stage": "refit", "name": "plain", "layer_passes": 0, "logit_passes": 0},
        ],
    ),
    "reference": (lambda _: REFERENCE, []),
}
"""How the source comes about, and the stages before quantization."""


@dataclass(frozen=True)
class Comparison:
    """One model."""

    output: Path
    name: str
    data: Path | None
    ours: list[str]
    types: list[str]

    @property
    def folder(self) -> Path:
        """All that belongs to the model."""
        return self.output / self.name

    def rows(self) -> dict[str, dict[str, Any]]:
        """Bits per weight and quality of each file."""
        recipe = self._recipe()
        result = run(recipe, self.folder / "run", device="cpu", progress=True)
        stages = {row.name.partition("-")[2]: self.folder / "run" / row.name for row in result.rows[1:]}
        plain = stages.get("plain", MODELS[self.name][0](self.output))
        files = {"16 bits": self._exported(plain, "16-bit", [])}
        for name in self.ours:
            files[f"ours, {name}"] = self._exported(stages[name], name, ["--embedding-bits=8"])
        importance = self._importance(recipe, plain, files["16 bits"])
        for name in self.types:
            files[name] = self._requantized(files["16 bits"], name, None)
            files[f"{name}, imatrix"] = self._requantized(files["16 bits"], name, importance)
        parameters = sum(Checkpoint(plain).shape.parameters_by_part().values())
        found = {}
        for name, file in files.items():
            found[name] = described(file, parameters) | self._quality(plain, file)
            Console().print(f"{self.name}, {name}: {found[name]['kl_divergence']:.3g}", highlight=False)
        return found

    def _recipe(self) -> Path:
        make_source, stages = MODELS[self.name]
        last = stages[-1]["name"] if stages else "source"
        recipe = {
            "name": f"gguf-peers-{self.name}",
            "model": {"source": str(make_source(self.output).resolve())},
            "calibration": {
                "source": str(self.data) if self.data else "python-docs",
                "samples": CALIBRATION_ROWS,
                "sequence_length": LENGTH,
            },
            "stages": stages
            + [{"stage": "quantize", "name": name, "from": last, "group_size": 32} | OURS[name] for name in self.ours],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        return self.folder / "recipe.yaml"

    def _exported(self, checkpoint: Path, name: str, options: list[str]) -> Path:
        folder = self.folder / "exports" / name
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "autoglm_compress", "export", checkpoint, "--format=gguf"]
            subprocess.run([*command, f"--output={folder}", "--called=model", *options], check=True)
        return next(folder.glob("*.gguf"))

    @torch.no_grad()
    def _importance(self, recipe: Path, plain: Path, file: Path) -> Path:
        """The mean squares of the inputs of each linear, by the names of the file's tensors."""
        target = self.folder / "importance.npz"
        if target.exists():
            return target
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        sums: dict[str, torch.Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                sums[name] = sums.get(name, 0) + inputs[0].double().square().sum((0, 1))

            return add

        architecture = bytes(GGUFReader(file).fields["general.architecture"].parts[-1]).decode()
        number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
        names = get_tensor_name_map(MODEL_ARCH(number), model.config.num_hidden_layers)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(note(f"{names.get_name(name)}.weight"))
        rows = calibration_rows(recipe, plain)
        for row in rows:
            model(row[None])
        np.savez(target, **{name: (total / rows.numel()).float().numpy() for name, total in sums.items()})
        return target

    def _requantized(self, file: Path, kind: str, importance: Path | None) -> Path:
        target = self.folder / "llama.cpp" / f"{kind}{'-imatrix' if importance else ''}.gguf"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            python = environment(self.output / "environments" / "llama-cpp-python", LLAMA_CPP_PYTHON)
            command = [python, WORKERS / "requantize.py", file, partial, str(importance or ""), *TYPES[kind]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            partial.rename(target)
        return target

    def _quality(self, plain: Path, file: Path) -> dict[str, Any]:
        """What llama.cpp predicts from a file, beside the checkpoint before quantization in fp32."""
        found = self.folder / "quality" / f"{file.parent.name}-{file.stem}.json"
        if not found.exists():
            found.parent.mkdir(exist_ok=True)
            rows = self.folder / "rows.npy"
            tokenizer = Checkpoint(plain).tokenizer()
            np.save(rows, token_rows(Reader(tokenizer), self.data, "held-out", HELD_OUT_ROWS, LENGTH, seed=0).numpy())
            reference = self.folder / "reference.npy"
            if not reference.exists():
                self._ask("run_transformers.py", {"model": str(plain), "rows": str(rows), "logits": str(reference)})
            job = {"model": str(file), "rows": str(rows), "reference": str(reference), "reorder": False}
            write_results(found, self._ask("run_llama_cpp.py", job))
        quality = json.loads(found.read_text())
        return {field: quality[field] for field in ("kl_divergence", "perplexity", "same_next_token")}

    def _ask(self, worker: str, job: dict[str, Any]) -> dict[str, Any]:
        question, answer = self.folder / "job.json", self.folder / "answer.json"
        threads = torch.get_num_threads()
        nothing = {"threads": threads, "context": LENGTH, "prompts": [], "decode": 0, "repeats": 0, "fill": 0}
        question.write_text(json.dumps(job | nothing))
        subprocess.run([sys.executable, WORKERS / worker, question, answer], check=True, stderr=subprocess.DEVNULL)
        return json.loads(answer.read_text())


def calibration_rows(recipe: Path, model: Path) -> torch.Tensor:
    """The rows of tokens [samples, length] that our stages calibrate on."""
    loaded = load_recipe(recipe)
    files = find_sources(loaded.calibration, loaded.bases)
    return torch.cat(CalibrationText(loaded.calibration, files, Checkpoint(model), Progress(Console())).batches)


def described(file: Path, parameters: int) -> dict[str, Any]:
    """Bytes of a GGUF file, bits per weight of its tensors, elements by type, matrices by the type that they have."""
    tensors = GGUFReader(file).tensors
    elements: Counter[str] = Counter()
    matrices: dict[str, list[str]] = {}
    for tensor in tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
        if len(tensor.shape) > 1:
            matrices.setdefault(tensor.tensor_type.name, []).append(tensor.name)
    fallen = sorted(name for kind, names in matrices.items() if not kind.endswith("_K") for name in names)
    return {
        "bytes": file.stat().st_size,
        "bits_per_weight": 8 * sum(int(tensor.n_bytes) for tensor in tensors) / parameters,
        "elements_by_type": dict(elements),
    } | ({"not_of_a_k_type": fallen} if file.stem.startswith(("Q4_K", "Q5_K")) else {})


def print_table(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Bits and quality of every file."""
    table = Table("", "bits per weight", "file", "KL", "same next token", "perplexity", "types", box=None)
    for side, row in rows.items():
        total = sum(row["elements_by_type"].values())
        kinds = ", ".join(
            f"{kind} {100 * n / total:.0f} %" for kind, n in row["elements_by_type"].items() if 50 * n > total
        )
        table.add_row(
            side,
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['kl_divergence']:.5f}",
            f"{100 * row['same_next_token']:.1f} %",
            f"{row['perplexity']:.2f}",
            kinds,
        )
    console = Console(width=160)
    console.print(f"\n{name}", highlight=False, style="bold")
    console.print(table, highlight=False)


def draw(found: dict[str, dict[str, dict[str, Any]]]) -> Any:
    """KL against bits per weight: ours, llama.cpp's, and llama.cpp's with an importance matrix."""
    figure, places = new_figure("KL from the 16-bit model against bits per weight", 3.2, columns=len(found))
    for axes, (name, rows) in zip(places, found.items(), strict=True):
        kinds = {"ours": {}, "llama.cpp": {}, "llama.cpp, imatrix": {}}  # type: dict[str, dict[str, dict[str, Any]]]
        for side, row in rows.items():
            if side == "16 bits":
                continue
            kind = "ours" if side.startswith("ours") else "llama.cpp, imatrix" if "imatrix" in side else "llama.cpp"
            kinds[kind][side.removeprefix("ours, ").removesuffix(", imatrix")] = row
        for color, (kind, points) in zip(LINES, kinds.items(), strict=False):
            bits = [row["bits_per_weight"] for row in points.values()]
            axes.scatter(bits, [row["kl_divergence"] for row in points.values()], 18, color=color, label=kind)
            for label, row in points.items():
                if kind != "llama.cpp, imatrix":
                    place = (row["bits_per_weight"], row["kl_divergence"])
                    axes.annotate(label, place, (4, 2), textcoords="offset points", fontsize=7)
        log_axis(axes, [row["kl_divergence"] for points in kinds.values() for row in points.values()])
        axes.set_title(name)
        axes.set_xlabel("bits per weight, embedding included")
        axes.set_ylabel("KL in nats")
    places[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--data", type=Path, help="text, a tenth of it held out (default: python-docs)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-gguf"))
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    output = arguments.output.resolve()
    results = output / "gguf_peers.json"
    found: dict[str, dict[str, Any]] = json.loads(results.read_text())["models"] if results.exists() else {}
    for name in arguments.models:
        comparison = Comparison(output, name, arguments.data, arguments.ours, arguments.types)
        found[name] = found.get(name, {}) | comparison.rows()
        print_table(name, found[name])
    write_results(
        results,
        {
            "calibration_rows": [CALIBRATION_ROWS, LENGTH],
            "held_out_rows": [HELD_OUT_ROWS, LENGTH],
            "packages": LLAMA_CPP_PYTHON,
            "models": found,
        },
    )
    (output / "gguf_peers.svg").write_bytes(as_svg(lambda: draw(found)) or b"")


if __name__ == "__main__":
    main()
