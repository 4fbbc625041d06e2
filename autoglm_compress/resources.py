"""Time, memory and disk traffic of a stretch of work."""

import json
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import psutil

SAMPLE_SECONDS = 0.02
SAVE_SECONDS = 5.0


class Resources:
    """A context manager that measures this process while it is open.

    With a file, it adds to the amounts that earlier processes spent on the same work, and saves every few seconds, so
    that a kill loses little.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        "seconds",
        "cpu_seconds",
        "peak_rss_bytes",
        "read_bytes",
        "written_bytes",
        "processes",
    )

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._process = psutil.Process()
        self._peak_rss_bytes = 0
        self._result: dict[str, Any] | None = None
        self._closed = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        saved = self._began
        while not self._closed.is_set():
            self._peak_rss_bytes = max(self._peak_rss_bytes, self._process.memory_info().rss)
            if self._file is not None and time.monotonic() - saved > SAVE_SECONDS:
                self._save(self._file)
                saved = time.monotonic()
            self._closed.wait(SAMPLE_SECONDS)

    def _save(self, file: Path) -> None:
        temporary = file.with_suffix(".partial")
        temporary.write_text(json.dumps(self.as_data()), encoding="utf-8")
        temporary.replace(file)

    def _counters(self) -> dict[str, float]:
        """Resources that the process has spent since it began. Disk traffic only where the system counts it (not on
        macOS).
        """
        times = self._process.cpu_times()
        found = {"cpu_seconds": times.user + times.system}
        if hasattr(self._process, "io_counters"):
            traffic = self._process.io_counters()
            found |= {"read_bytes": traffic.read_bytes, "written_bytes": traffic.write_bytes}
        return found

    def __enter__(self) -> "Resources":
        self._earlier = json.loads(self._file.read_text()) if self._file and self._file.exists() else {}
        self._began, self._before = time.monotonic(), self._counters()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._sampler.join()
        self._result = self.as_data()
        if self._file is not None:
            self._save(self._file)

    def as_data(self) -> dict[str, Any]:
        """Plain data: seconds, bytes, and how many processes took part; of all since the work began."""
        if self._result is not None:
            return self._result
        spent = {"seconds": time.monotonic() - self._began, "processes": 1}
        spent |= {name: value - self._before[name] for name, value in self._counters().items()}
        added = {name: round(value + self._earlier.get(name, 0), 3) for name, value in spent.items()}
        return added | {"peak_rss_bytes": max(self._peak_rss_bytes, self._earlier.get("peak_rss_bytes", 0))}
