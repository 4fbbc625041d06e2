"""The one exception a user is meant to see."""


class UserError(Exception):
    """Something the user can put right: shown as one message, exit code 2, no traceback."""
