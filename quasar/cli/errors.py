"""How commands end: errors that the user can act on, and output whose reader has closed the pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from quasar.errors import QuasarError
from quasar.results.console import OutputClosedError


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print an error that the user can act on without its traceback, and exit with its code."""
    try:
        yield
    except OutputClosedError:
        # The interpreter flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except QuasarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
