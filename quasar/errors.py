"""The errors that users see, and their exit codes."""

from __future__ import annotations

import os
import sys
import traceback


class QuasarError(Exception):
    """The run failed (exit code 1); the message says what happened and where."""

    exit_code = 1


class RequestError(QuasarError):
    """The request was wrong (exit code 2): the message names the value, the place and the remedy."""

    exit_code = 2


def report(error: QuasarError) -> int:
    """Print the error in one line, and with HYDRA_FULL_ERROR=1 also its traceback. Returns the exit code."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
