"""What a server tells Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds of the histogram of times to the first token; 0.5 is what a person notices."""


class Measures:
    """Counts of requests and tokens, the time to the first token, and the queue."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "autoglm", "registry": self.registry}
        self.requests = Counter("requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], **common)
        self.cancelled = Counter("cancelled_requests", "Requests whose client was gone before the end.", **common)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **common)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers.", **common)
        self.first_token = Histogram(
            "first_token_seconds",
            "From a streamed request to the first text of its answer, with the time in the queue.",
            buckets=SECONDS,
            **common,
        )
        self.waiting = Gauge("waiting_requests", "Requests in the queue.", **common)
        self.running = Gauge("running_requests", "Requests that the engine works on.", **common)
        self.restarts = Gauge("engine_restarts", "How often the engine was started again.", **common)
        self.up = Gauge("engine_up", "Whether the engine answers.", **common)

    def count_usage(self, usage: dict[str, Any] | None) -> None:
        """Add the tokens of an answer, as its `usage` tells them."""
        for name, counter in (("prompt_tokens", self.prompt_tokens), ("completion_tokens", self.generated_tokens)):
            counter.inc((usage or {}).get(name) or 0)
