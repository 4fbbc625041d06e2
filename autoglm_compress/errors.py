"""The exceptions that end a command in one message."""


class UserError(Exception):
    """Something the user can put right: shown as one message, exit code 2, no traceback."""


class PlanError(ValueError):
    """A stage cannot work on the shape it is given; `option` names the option to change."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Terminated(BaseException):
    """The system asked the process to end (SIGTERM)."""
