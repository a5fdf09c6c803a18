"""The errors that users see, and their exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path


class QuasarError(Exception):
    """The run failed (exit code 1); the message says what happened and where."""

    exit_code = 1


class RequestError(QuasarError):
    """The request was wrong (exit code 2): the message names the value, the place and the remedy."""

    exit_code = 2


class StorageError(QuasarError):
    """A file or folder cannot be written; the message names it and the remedy."""


_FULL = "free some space there, or choose a folder on another disk; the same command continues the run"
_FORBIDDEN = "choose a folder that you may write to (hydra.run.dir, for a sweep hydra.sweep.dir)"
_IN_THE_WAY = "a file is in the way; remove it or choose another folder (hydra.run.dir, for a sweep hydra.sweep.dir)"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter path (hydra.run.dir, for a sweep hydra.sweep.dir)",
    errno.EIO: "the disk does not answer; choose a folder on another disk",
    errno.ESTALE: "the disk was mounted again; start the same command again to continue the run",
}


def storage_error(path: Path | str, error: OSError) -> StorageError:
    """Return the error for a file or folder that cannot be written, with the remedy for the cause."""
    remedy = _REMEDIES.get(error.errno or 0, "check this path")
    return StorageError(f"{path}: {error.strerror or error}; {remedy}")


def report(error: Exception) -> int:
    """Print an error and return the exit code.

    An error that the user can act on takes one line, and with HYDRA_FULL_ERROR=1 also its traceback. Any other error is
    one of the program, so its traceback is printed.
    """
    known = actionable(error)
    if known is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    if known is None:
        return QuasarError.exit_code
    print(f"error: {known}", file=sys.stderr)
    return known.exit_code


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def actionable(error: BaseException) -> QuasarError | None:
    """Return the error as one that the user can act on, or None if it is an error of the program."""
    if isinstance(error, QuasarError):
        return error
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return storage_error(error.filename or "an output file", error)
    return None
