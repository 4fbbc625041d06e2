"""Time and memory of a stretch of work."""

import threading
import time
from types import TracebackType

import psutil

SAMPLE_SECONDS = 0.02


class Resources:
    """A context manager that measures wall time and the peak resident memory of this process while it is open."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_rss_bytes = 0
        self._process = psutil.Process()
        self._closed = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._closed.is_set():
            self.peak_rss_bytes = max(self.peak_rss_bytes, self._process.memory_info().rss)
            self._closed.wait(SAMPLE_SECONDS)

    def __enter__(self) -> "Resources":
        self._began = time.monotonic()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._sampler.join()
        self.seconds = time.monotonic() - self._began

    def as_data(self) -> dict[str, float | int]:
        """Plain data: seconds and bytes."""
        return {"seconds": round(self.seconds, 3), "peak_rss_bytes": self.peak_rss_bytes}
