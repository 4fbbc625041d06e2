"""The training loop: one step per batch, checks on deciding rows, and a state on disk to continue from."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from autoglm_compress.calibration.training_rows import TrainingRows
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.errors import UserError
from autoglm_compress.healing.model import Student, full, sharded_like
from autoglm_compress.healing.optimizer import learning_rate, make_optimizers
from autoglm_compress.healing.options import HealingOptions
from autoglm_compress.healing.teacher import Teacher
from autoglm_compress.healing.training_state import load_state, save_state
from autoglm_compress.runtime import Runtime

GRADIENT_NORM = 1.0
SAVE_SECONDS = 600.0
CURVE_POINTS = 200
DIVERGED, MARGIN = 2.0, 0.1
"""Training has failed if the divergence in a check is this many times the first one and this many nats above it."""


@dataclass(frozen=True)
class Check:
    """KL(teacher || student) in nats on the held-out rows after so many steps and tokens."""

    step: int
    tokens: int
    divergence: float


@dataclass(frozen=True)
class Point:
    """Mean loss of the steps since the last point."""

    tokens: int
    loss: float
    learning_rate: float


class Trainer:
    """Trains the student's parameters that require a gradient, through `wrapped`: the student, or the module that
    shards it.

    Under `torchrun` every process has a trainer and rows of its own of each batch; the first process keeps the state.
    """

    def __init__(
        self,
        student: Student,
        wrapped: nn.Module,
        teacher: Teacher,
        data: TrainingRows,
        options: HealingOptions,
        folder: Path,
        runtime: Runtime,
    ) -> None:
        self.wrapped, self.teacher, self.data, self.options = wrapped, teacher, data, options
        self.folder, self.progress = folder, runtime.progress
        folder.mkdir(parents=True, exist_ok=True)
        self.processes = runtime.processes
        self.parameters = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.optimizers = make_optimizers(self.parameters, options)
        self.device = self.parameters[0][1].device
        self.steps = len(data.order) // options.batch_size
        self.length = data.rows.shape[1]
        self.step = 0
        self.curve: list[Point] = []
        self.checks: list[Check] = []
        self.stopped: str | None = None
        """Why training ended before its last step."""
        self._losses: list[float] = []
        self.averages = [p.detach().clone() for _, p in self.parameters] if options.ema else []

    @property
    def best_check(self) -> Check:
        """The check with the lowest divergence. The first of equal ones, and the first if all are NaN."""
        best = self.checks[0]
        for check in self.checks:
            best = check if check.divergence < best.divergence else best
        return best

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters at the best check, by name; empty if nothing was better than the start."""
        return load_file(self._best_file(self.best_check)) if self.best_check.step else {}

    def _best_file(self, check: Check) -> Path:
        return self.folder / f"best-{check.step:07d}.safetensors"

    def run(self) -> None:
        """Train to the end, or until it fails.

        Raises:
            UserError: the loss was never finite, or nothing was better than the start when it failed.
        """
        self._resume()
        if not self.checks:
            self._check()
            if not math.isfinite(self.checks[0].divergence):
                self._failed(f"before any training the divergence is {self.checks[0].divergence}")
        checked = {round(self.steps * number / self.options.checks) for number in range(1, self.options.checks + 1)}
        total, reached = self.steps * self._step_tokens, self.step * self._step_tokens
        saved = time.monotonic()
        with self.progress.task("healing", total=total, unit="tokens", reached=reached) as advance:
            while self.step < self.steps:
                loss = self._train_step()
                if not math.isfinite(loss):
                    self._failed(f"the loss is {loss}")
                    return
                advance(self._step_tokens, self._status())
                if self.step in checked:
                    self._check()
                    if not self.checks[-1].divergence < DIVERGED * self.checks[0].divergence + MARGIN:
                        self._failed(f"the divergence on held-out rows is {self.checks[-1].divergence:.3g} nats")
                        return
                if self.step in checked or (self.processes.count == 1 and time.monotonic() - saved > SAVE_SECONDS):
                    self._save()
                    saved = time.monotonic()

    @property
    def _step_tokens(self) -> int:
        return self.options.batch_size * self.length

    @property
    def _rows_at_once(self) -> int:
        return self.options.micro_batch_size or self.options.batch_size // self.processes.count

    def _train_step(self) -> float:
        """One step of the optimizers on the next batch; returns its mean loss over all processes."""
        rate, size = learning_rate(self.step, self.steps, self.options), self.options.batch_size
        mine = self.data.order[self.step * size : (self.step + 1) * size][self.processes.rank :: self.processes.count]
        total = torch.zeros((), device=self.device)
        for numbers in mine.split(self._rows_at_once):
            part = self._loss(numbers) * (len(numbers) / len(mine))
            part.backward()
            total += part.detach()
        if self.processes.count > 1:
            distributed.all_reduce(total)
            total /= self.processes.count
        loss = total.item()
        if math.isfinite(loss):
            nn.utils.clip_grad_norm_([parameter for _, parameter in self.parameters], GRADIENT_NORM)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            self._losses.append(loss)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.step += 1
        if len(self._losses) >= max(1, self.steps // CURVE_POINTS) or self.step == self.steps:
            self._add_point(rate)
        if self.options.ema is not None:
            for average, (_, parameter) in zip(self.averages, self.parameters, strict=True):
                average.lerp_(parameter.detach(), 1 - self.options.ema)
        return loss

    def _loss(self, numbers: torch.Tensor, plain: bool = False) -> torch.Tensor:
        """The loss of some rows: the one trained on, or the divergence alone."""
        rows = self.data.rows[numbers].long().to(self.device)
        target, boundaries = self.teacher.ask(numbers, rows)
        if plain:
            return self.wrapped(rows, target)
        return self.wrapped(rows, target, self.options.cross_entropy, self.options.residual, boundaries)

    def _add_point(self, rate: float) -> None:
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            self.curve.append(Point(self.step * self._step_tokens, float(f"{mean:.6g}"), float(f"{rate:.4g}")))
            self._losses = []

    def _status(self) -> str:
        loss = self._losses[-1] if self._losses else self.curve[-1].loss
        return f"loss {loss:.4f}, held out {self.checks[-1].divergence:.4f}"

    @torch.no_grad()
    def _check(self) -> None:
        """Measure the divergence on the held-out rows, and keep the weights if they are the best so far."""
        self._swap_averages()
        rows = self.data.held_out.split(self._rows_at_once)
        total = sum(self._loss(numbers, plain=True).item() * len(numbers) for numbers in rows)
        # All processes or none must do the rest, so their numbers must agree to the last bit.
        divergence = self.processes.tell(total / len(self.data.held_out))
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.reshard()  # the next forward pass gathers the changed weights
        check = Check(self.step, self.step * self._step_tokens, divergence)
        self.checks.append(check)
        if self.step and self.best_check is check:
            self._write(lambda tensors: save_atomically(self._best_file(check), tensors), self._weights())
        self._swap_averages()

    def _swap_averages(self) -> None:
        for average, (_, parameter) in zip(self.averages, self.parameters, strict=False):
            held = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(held)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.parameters)

    def _write(
        self, save: Callable[[dict[str, torch.Tensor]], None], tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        """Save tensors in the first process. All processes must call it with their parts."""
        whole = {}
        for name, tensor in tensors:
            gathered = full(tensor)
            if self.processes.is_first:
                whole[name] = gathered.cpu()
        if whole:
            save(whole)

    def _save(self) -> None:
        """Save everything that training needs to continue."""
        numbers: dict[str, Any] = {
            "step": self.step,
            "curve": [asdict(point) for point in self.curve],
            "checks": [asdict(check) for check in self.checks],
            "losses": self._losses,
            "optimizers": {},
        }
        tensors = [(f"weight/{name}", tensor) for name, tensor in self._weights()]
        tensors += [(f"average/{name}", mean) for (name, _), mean in zip(self.parameters, self.averages, strict=False)]
        for name, key, value in self._optimizer_states():
            if isinstance(value, torch.Tensor):
                tensors.append((f"optimizer/{name}/{key}", value))
            else:
                numbers["optimizers"].setdefault(name, {})[key] = value
        self._write(lambda whole: save_state(self.folder / "state", whole, numbers), tensors)
        if self.processes.is_first:
            for file in self.folder.glob("best-*.safetensors"):
                if file != self._best_file(self.best_check):
                    file.unlink()

    def _optimizer_states(self) -> Iterator[tuple[str, str, Any]]:
        for optimizer in self.optimizers:
            for name, parameter in self.parameters:
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield name, key, value

    def _resume(self) -> None:
        """Continue from the state of an earlier run."""
        with self.processes.first_goes_first():
            state = load_state(self.folder / "state")
        if state is None:
            return
        tensors, numbers = state
        self.step, self._losses = numbers["step"], numbers["losses"]
        self.curve = [Point(**point) for point in numbers["curve"]]
        self.checks = [Check(**check) for check in numbers["checks"]]
        averages = iter(self.averages)
        for name, parameter in self.parameters:
            parameter.data.copy_(sharded_like(tensors[f"weight/{name}"], parameter))
            for average in itertools.islice(averages, 1):
                average.copy_(sharded_like(tensors[f"average/{name}"], parameter))
            self._resume_optimizer(name, parameter, tensors, numbers["optimizers"].get(name, {}))

    def _resume_optimizer(
        self, name: str, parameter: nn.Parameter, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
    ) -> None:
        prefix = f"optimizer/{name}/"
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        for optimizer in self.optimizers:
            if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
                optimizer.state[parameter] = numbers | {
                    key: sharded_like(value, parameter) if value.dim() else value for key, value in found.items()
                }

    def _failed(self, reason: str) -> None:
        best = self.best_check
        if not best.step:
            raise UserError(
                f"healing failed at step {self.step} of {self.steps}: {reason}, and no check before was better than "
                "the start. Lower learning_rate, or raise warmup."
            )
        self.stopped = f"step {self.step} of {self.steps}: {reason}"
        self.progress.note(
            f"warning: healing stopped at step {self.step} of {self.steps}: {reason}. Kept the weights of step "
            f"{best.step}, {best.divergence:.4f} nats; a lower learning_rate may go further."
        )
