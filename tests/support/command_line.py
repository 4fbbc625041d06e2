"""What the command line answers: plans, and refusals in one message."""

import json
from typing import Any

from support.running import invoke


def plan(*arguments: object) -> dict[str, Any]:
    """What `plan --json` prints."""
    result = invoke("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def shapes(*arguments: object) -> list[dict[str, Any]]:
    """The planned shapes, from the source to the last stage."""
    return [checkpoint["shape"] for checkpoint in plan(*arguments)["checkpoints"]]


def refusal(*arguments: object) -> str:
    """The one message with which a command ends; a traceback would be raised here."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    _, marker, message = result.output.partition("error: ")
    assert marker, result.output
    assert "error: " not in message
    print(message)  # pytest shows it where a test fails
    return message


def assert_says(message: str, *words: object) -> None:
    """Every one of these is in the message."""
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"
