"""The commands ``quasar wandb``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quasar.cli.errors import reported_errors
from quasar.results.console import Reporter

commands = typer.Typer(no_args_is_help=True, help="Runs in Weights & Biases.")


@commands.command("push")
def push_runs(
    folder: Annotated[Path, typer.Argument(help="a run, a sweep, or any folder above runs")],
    mode: Annotated[
        str | None, typer.Option(help="auto, online or offline; default: the mode in the run's configuration")
    ] = None,
    project: Annotated[str | None, typer.Option(help="use this project instead of the run's")] = None,
    entity: Annotated[str | None, typer.Option(help="use this user or team instead of the run's")] = None,
) -> None:
    """Log run folders to W&B. Pushing a run again updates the same W&B run."""
    from quasar.results.wandb.pushing import push_all

    given = {"mode": mode, "project": project, "entity": entity}
    with reported_errors():
        failed = push_all(folder, {key: value for key, value in given.items() if value is not None}, Reporter())
    raise typer.Exit(1 if failed else 0)
