"""The two errors that end a command without a traceback."""


class UserError(Exception):
    """The request was wrong (exit status 2): the message names the value, what was expected and what to do."""


class RunError(Exception):
    """The run failed (exit status 1): diverged, out of disk, interrupted. The message says what is safe and where."""
