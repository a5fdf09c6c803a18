"""The errors a user can cause or meet, and the exit code of each."""


class QuasarError(Exception):
    """The run failed (exit code 1); the message says what happened and where."""

    exit_code = 1


class RequestError(QuasarError):
    """The request was wrong (exit code 2): the message names the value, the place and the remedy."""

    exit_code = 2
