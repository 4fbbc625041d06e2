"""Progress of long steps: a bar with rate, remaining time and memory on a terminal, plain lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import psutil
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

LINE_EVERY_SECONDS = 15.0


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed or 0.0, task.fields["unit"]))


class _MemoryColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_memory(), style="dim")


def _rate(speed: float, unit: str) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if speed >= limit:
            return f"{speed / limit:.1f}{suffix} {unit}/s"
    return f"{speed:.1f} {unit}/s"


def _memory() -> str:
    return f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB"


def _titled(title: str, status: str) -> str:
    return f"{title} ({status})" if status else title


class Advance(Protocol):
    """Tells that work was done."""

    def __call__(self, amount: float, status: str = "") -> None:
        """The amount of work done, and a few words about the step."""


def silent() -> "Progress":
    """Shows nothing: for the parts of a step that is shown itself."""
    return Progress(Console(quiet=True, force_terminal=False))


class Progress:
    """Shows the progress of the steps of a run, one at a time."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, message: str) -> None:
        """Print one line about the run."""
        self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def task(self, title: str, total: int, unit: str, reached: int = 0) -> Iterator["Advance"]:
        """Show one step. Call the returned function with the amount of work done since the last call.

        A few words on the state of the step may be added. `reached` is the amount that an earlier run has done, which
        says nothing about the rate.
        """
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=total, unit=unit, completed=reached)

                def advance(amount: float, status: str = "") -> None:
                    bar.update(task, advance=amount, description=_titled(title, status))

                yield advance
        else:
            yield self._lines(title, total, unit, reached)

    def _bar(self) -> RichProgress:
        return RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            _MemoryColumn(),
            console=self.console,
        )

    def _lines(self, title: str, total: int, unit: str, reached: int) -> "Advance":
        began = shown = time.monotonic()
        done: float = reached

        def advance(amount: float, status: str = "") -> None:
            nonlocal done, shown
            done += amount
            now = time.monotonic()
            if now - shown < LINE_EVERY_SECONDS and done < total:
                return
            shown = now
            speed = (done - reached) / max(now - began, 1e-9)
            left = (total - done) / max(speed, 1e-9)
            share = 100 * done / max(total, 1)
            self.note(f"{_titled(title, status)}: {share:.0f}%, {_rate(speed, unit)}, {left:.0f} s left, {_memory()}")

        return advance
