"""The commands ``quasar cache``: list, measure and empty the cache."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quasar.results.console import Reporter

commands = typer.Typer(
    no_args_is_help=True, help="The cache of models, calibration statistics, reference answers and kernels."
)


@commands.command("list")
def list_cache() -> None:
    """List the kinds of entries in the cache, with their number and size."""
    from quasar.cache import cache_folder, kinds

    reporter = Reporter()
    rows = [(kind.name, str(kind.entries), f"{kind.bytes / 1e6:.1f}") for kind in kinds()]
    reporter.table(str(cache_folder()), ("kind", "entries", "MB"), rows)


@commands.command("size")
def cache_size() -> None:
    """Print the size of the cache in bytes."""
    from quasar.cache import kinds

    Reporter().line(str(sum(kind.bytes for kind in kinds())))


@commands.command("clear")
def clear_cache(
    kind: Annotated[str | None, typer.Argument(help="one kind that quasar cache list shows; default: all")] = None,
) -> None:
    """Delete the entries of the cache, except those that a running process is computing."""
    from quasar.cache import clear

    try:
        freed = clear(kind)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    Reporter().line(f"freed {freed / 1e6:.1f} MB")
