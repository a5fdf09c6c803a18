"""How commands report an error that the user can act on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from quasar.errors import QuasarError


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print an error that the user can act on without its traceback, and exit with its code."""
    try:
        yield
    except QuasarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
