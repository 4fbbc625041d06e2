"""Running recipes on tiny models the way a user does, in this process or in one that is killed on the way."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from autoglm_compress.cli import app
from autoglm_compress.hashing import sha256

CALIBRATION = {"source": "python-docs", "samples": 4, "sequence_length": 32}
EVALUATION = {"perplexity": {"samples": 2, "sequence_length": 32}}
CHILD_SECONDS = 120
os.fsync = lambda _: None  # no test cuts the power, and disks take their time
SLOW_IMPORTS = ["autoglm_compress.pipeline", "transformers.models.glm.modeling_glm", "typer.testing"]


def write_recipe(folder: Path, source: Path, stages: Sequence[dict[str, Any]], **changes: Any) -> Path:
    """A recipe on few short samples."""
    recipe = {"name": "test", "model": {"source": str(source)}, "calibration": CALIBRATION, "evaluation": EVALUATION}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | {"stages": list(stages)} | changes))
    return file


def invoke(*arguments: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def run(recipe: Path, *arguments: object, pictures: bool = False) -> str:
    """Run a recipe into `out` beside it; what the user saw, with line breaks as spaces."""
    with _drawing(pictures):
        result = invoke(*_run_command(recipe, *arguments))
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@contextmanager
def _drawing(pictures: bool) -> Iterator[None]:
    """Draw pictures, or leave them empty: to draw them takes three quarters of a run of a tiny model."""
    blank = b'<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt"/>'
    with ExitStack() as stack:
        for module in () if pictures else ("stages.drawing", "report.page"):
            stack.enter_context(patch(f"autoglm_compress.{module}.as_svg", lambda make: blank))
        yield


def _run_command(recipe: Path, *arguments: object) -> tuple[object, ...]:
    return "run", recipe, "--output", recipe.parent / "out", "--device", "cpu", *arguments


def compress(folder: Path, source: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    """Run stages on a model; the folder of the last one that made a checkpoint."""
    run(write_recipe(folder, source, stages, **changes))
    return stage_folders(folder / "out")[-1]


def stage_folders(output: Path) -> list[Path]:
    """The checkpoints of a run, in order."""
    return sorted(path.parent for path in output.glob("[0-9][0-9]-*/config.json"))


def result_folders(output: Path) -> list[Path]:
    """What the stages of a run left, in order, checkpoints or not."""
    return sorted(path.parent for path in output.glob("[0-9][0-9]-*/stage.json"))


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whatever the shards."""
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def digests(output: Path) -> dict[str, str]:
    """The hash of every file of every checkpoint of a run, but for `stage.json`, which holds seconds and memory."""
    files = [file for stage in stage_folders(output) for file in stage.iterdir() if file.name != "stage.json"]
    return {str(file.relative_to(output)): sha256(file) for file in files}


def load(checkpoint: Path, dtype: torch.dtype | str = torch.float32) -> torch.nn.Module:
    """A checkpoint in plain transformers, which must find every tensor it looks for and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, length, vocab] of token ids [batch, length]."""
    return model(tokens).logits


@dataclass(frozen=True)
class Kill:
    """`kill -9` before or after a call of a function, such as `pathlib:Path.rename`.

    Only calls with a text or path among their arguments that contains `argument` count.
    """

    function: str
    argument: str = ""
    call: int = 1
    before: bool = True

    def arm(self) -> None:
        """Replace the function in this process."""
        module, _, path = self.function.partition(":")
        *parents, name = path.split(".")
        owner = import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            texts = [str(value) for value in args if isinstance(value, str | Path)]
            counts = not self.argument or any(self.argument in text for text in texts)
            calls += counts
            now = counts and calls == self.call
            if now and self.before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)


def half_written(file: str, call: int = 1) -> Kill:
    """Killed when a file has its bytes, under a temporary name."""
    return Kill("pathlib:Path.replace", file, call)


def just_written(file: str, call: int = 1) -> Kill:
    """Killed when a file has its name, and nothing happened since."""
    return Kill("pathlib:Path.replace", file, call, before=False)


def run_until_killed(recipe: Path, kill: Kill, *arguments: object, pictures: bool = False) -> bool:
    """Run a recipe in a process of its own; False if it was not killed but finished."""
    return invoke_until_killed(kill, *_run_command(recipe, *arguments), pictures=pictures)


def invoke_until_killed(kill: Kill, *arguments: object, pictures: bool = False) -> bool:
    """The command line in a process of its own; False if it was not killed but finished."""
    context = multiprocessing.get_context("forkserver")  # children share what it has imported, and no threads
    context.set_forkserver_preload(SLOW_IMPORTS)
    child = context.Process(target=_child, args=(kill, arguments, pictures))
    child.start()
    child.join(CHILD_SECONDS)
    if child.is_alive():
        child.kill()
        raise AssertionError(f"still running after {CHILD_SECONDS} s")
    assert child.exitcode in (0, -signal.SIGKILL), f"exit code {child.exitcode}"
    return child.exitcode != 0


def _child(kill: Kill, arguments: tuple[object, ...], pictures: bool) -> None:
    torch.set_num_threads(1)
    kill.arm()
    with _drawing(pictures):
        result = invoke(*arguments)
    assert result.exit_code == 0, result.output
