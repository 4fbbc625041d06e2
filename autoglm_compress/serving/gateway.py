"""The API that clients see, in front of an engine."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from autoglm_compress.serving.answering import Translation
from autoglm_compress.serving.asking import Request, bounded, chat_request, completion_request, parse_body
from autoglm_compress.serving.keys import is_allowed
from autoglm_compress.serving.lengths import Lengths
from autoglm_compress.serving.measures import Measures
from autoglm_compress.serving.problems import RefusedError
from autoglm_compress.serving.relay import Queue, Relay, refused
from autoglm_compress.serving.supervisor import Supervisor
from autoglm_compress.serving.target import Target

MOST_BODY_BYTES = 32 << 20
"""Of a request: a few photographs as base64."""
OWNER = "autoglm-compress"


@dataclass(frozen=True)
class Served:
    """A model, the name that clients call it, the tokens of a text with its answer, and the keys of clients."""

    target: Target
    name: str
    context: int
    keys: tuple[bytes, ...]


def make_gateway(served: Served, supervisor: Supervisor) -> FastAPI:
    """The application that answers clients."""
    app = FastAPI(title=OWNER)
    measures = Measures()
    engine = supervisor.engine
    queue = Queue(engine.slots, measures)
    # Engines that do not look at lengths are not asked for more than the model reads.
    lengths = None if engine.strict else Lengths(served.target.path, served.context)
    model = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": OWNER}
    model["max_model_len"] = served.context

    async def refuse(http: HttpRequest, refusal: Exception) -> Response:
        assert isinstance(refusal, RefusedError)
        measures.requests.labels(http.scope["route"].path, refusal.status).inc()
        return refused(refusal)

    app.add_exception_handler(RefusedError, refuse)

    def require_key(http: HttpRequest) -> None:
        if not is_allowed(http.headers.get("authorization", ""), served.keys):
            headers = {"WWW-Authenticate": "Bearer"}
            raise RefusedError(401, "the API key is not one of this server's.", "authentication_error", headers=headers)

    async def relay(endpoint: str, request: Request, in_text: bool) -> Response:
        if lengths is not None:
            request = bounded(request, await asyncio.to_thread(lengths.room, request.texts))
        translation = Translation(served.name, request.reasoning, in_text)
        return Relay(endpoint, request, supervisor, queue, translation, measures)

    async def asked(http: HttpRequest) -> dict[str, Any]:
        require_key(http)
        return parse_body(await _read(http))

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        request = chat_request(await asked(http), served.target, engine, served.name, served.context)
        return await relay("/v1/chat/completions", request, in_text=served.target.thinks)

    @app.post("/v1/completions")
    async def complete(http: HttpRequest) -> Response:
        request = completion_request(await asked(http), engine, served.name, served.context)
        return await relay("/v1/completions", request, in_text=False)

    @app.get("/v1/models")
    async def models(http: HttpRequest) -> Response:
        require_key(http)
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, http: HttpRequest) -> Response:
        require_key(http)
        if name != served.name:
            raise RefusedError(404, f"no model {name!r} is served here: {served.name} is.", parameter="model")
        return JSONResponse(model)

    @app.get("/health")
    async def health() -> Response:
        up = supervisor.client is not None
        body = {"status": "ok" if up else "the engine is being started again", "model": served.name}
        return JSONResponse(body, 200 if up else 503)

    @app.get("/metrics")
    async def metrics(http: HttpRequest) -> Response:
        require_key(http)
        measures.up.set(supervisor.client is not None)
        measures.restarts.set(supervisor.restarts)
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _read(http: HttpRequest) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: it is too large.
    """
    data = bytearray()
    async for piece in http.stream():
        data += piece
        if len(data) > MOST_BODY_BYTES:
            raise RefusedError(413, f"the body has more than {MOST_BODY_BYTES >> 20} MiB, the most that is read.")
    return bytes(data)
