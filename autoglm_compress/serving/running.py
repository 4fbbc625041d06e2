"""An engine and the gateway in front of it, from the first token to the last request."""

import socket
from collections.abc import Callable

import uvicorn

from autoglm_compress.serving.engines import Engine
from autoglm_compress.serving.gateway import Served, make_gateway
from autoglm_compress.serving.supervisor import Supervisor


async def run(
    served: Served, engine: Engine, listener: socket.socket, drain_seconds: int, note: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; then let running requests end, and stop the engine.

    Args:
        served: what clients get.
        engine: who answers.
        listener: a bound socket.
        drain_seconds: how long running requests may take after the signal.
        note: shows a line to the user.

    Raises:
        UserError: the engine did not start.
    """
    async with Supervisor(engine, note) as supervisor:
        config = uvicorn.Config(
            make_gateway(served, supervisor),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=drain_seconds,
            server_header=False,
        )
        await _Announced(config, served.name, note).serve([listener])


class _Announced(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, name: str, note: Callable[[str], None]) -> None:
        super().__init__(config)
        self._name = name
        self._note = note

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            address = f"[{host}]" if ":" in host else host
            self._note(f"Model {self._name} is ready for inference")
            self._note(f"Uvicorn running on http://{address}:{port} (Press CTRL+C to quit)")
