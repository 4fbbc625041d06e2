"""What a request is refused with, in the form that clients of OpenAI's API read."""

from typing import Any


class RefusedError(Exception):
    """An answer that says what is wrong with a request, or with the server.

    Args:
        status: of HTTP.
        message: for people.
        kind: the `type` of OpenAI's errors.
        parameter: the field of the request that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self._error = {"message": message, "type": kind, "param": parameter, "code": status}

    def as_data(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": self._error}


def unavailable(message: str) -> RefusedError:
    """The server cannot answer now."""
    return RefusedError(503, message, "server_error", headers={"Retry-After": "1"})


def of_engine(status: int, body: Any, text: str) -> RefusedError:
    """What an engine refused a request with, whatever its form: `error` or `detail` in JSON, or plain text."""
    found = body.get("error", body.get("detail", body)) if isinstance(body, dict) else None
    message = found.get("message", found) if isinstance(found, dict) else found
    if status < 500:
        return RefusedError(status, str(message or text))
    return RefusedError(502, f"the engine failed: {message or text}", "server_error")
