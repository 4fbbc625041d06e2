"""The exceptions that end a command in one message."""


class UserError(Exception):
    """Something the user can put right: shown as one message, exit code 2, no traceback."""


class Terminated(BaseException):
    """The system asked the process to end (SIGTERM)."""
