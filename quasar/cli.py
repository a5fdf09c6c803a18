"""The ``quasar`` command: everything around runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from quasar.config.schema import CONF, ModelSource, register
from quasar.console import Reporter
from quasar.errors import QuasarError, RequestError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Quasar's tools around runs.")
models = typer.Typer(no_args_is_help=True, help="Models that conf/model names.")
app.add_typer(models, name="models")
kept = typer.Typer(
    no_args_is_help=True, help="What is kept between runs: models, calibration statistics, answers, kernels."
)
app.add_typer(kept, name="cache")
wandb_runs = typer.Typer(no_args_is_help=True, help="Weights & Biases.")
app.add_typer(wandb_runs, name="wandb")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Decode prompts and measure: takes what run.py takes, verifier=int4 drafter=lookahead for example."""
    from quasar.main import main

    sys.argv = ["quasar run", *context.args]
    raise typer.Exit(main())


@models.command()
def fetch(
    name: Annotated[str, typer.Argument(help="a file of conf/model, without .yaml")],
    path: Annotated[str | None, typer.Option(help="a folder or GGUF file instead of the model's own source")] = None,
) -> None:
    """Download and prepare a model ahead of its first run."""
    reporter = Reporter()
    try:
        source = model_source(name, path)
        from quasar.model.sources import locate

        with reporter.stages() as stage:
            checkpoint = locate(source, stage)
    except QuasarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    reporter.line(f"{name}: {checkpoint.origin}")
    reporter.line(f"in {checkpoint.folder}")


@models.command("list")
def list_models() -> None:
    """Name every model of conf/model and where it comes from."""
    reporter = Reporter()
    for name in model_names():
        source = model_source(name)
        reporter.line(f"{name:<16} {source.repo or source.source}")


@app.command("collect")
def collect_runs(
    folder: Annotated[Path, typer.Argument(help="a sweep, or any folder above runs")],
    output: Annotated[Path | None, typer.Option(help="stem of the table's files; FOLDER/collected by default")] = None,
    watch: Annotated[bool, typer.Option(help="refresh a table of states until every run has ended")] = False,
    every: Annotated[float, typer.Option(help="seconds between refreshes")] = 5.0,
) -> None:
    """Gather all runs below a folder into one table, as Parquet and CSV; list what failed or was cut short."""
    from quasar.results.overview import collect, follow

    reporter = Reporter()
    try:
        if watch:
            follow(folder, every, reporter)
        collect(folder, output or folder / "collected", reporter)
    except QuasarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


@app.command("plot")
def plot_runs(
    folder: Annotated[Path, typer.Argument(help="a sweep, or any folder above runs")],
    output: Annotated[Path | None, typer.Option(help="folder of the figures; FOLDER/figures by default")] = None,
) -> None:
    """Draw the figures that the metrics of the runs below a folder allow, as PDF, SVG and PNG."""
    from quasar.results.collect import Collector, tabulate
    from quasar.results.figures.runs import draw_all

    reporter = Reporter()
    try:
        runs = Collector(folder).runs()
        if not runs:
            raise RequestError(f"{folder}: there are no runs below it; pass a folder that runs were written to")
        files = draw_all(tabulate(runs, folder), output or folder / "figures")
    except QuasarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    for file in files:
        reporter.line(f"wrote {file}")


@wandb_runs.command("push")
def push_runs(
    folder: Annotated[Path, typer.Argument(help="a run, a sweep, or any folder above runs")],
    mode: Annotated[
        str | None, typer.Option(help="auto, online or offline; by default as the run was configured")
    ] = None,
    project: Annotated[str | None, typer.Option(help="another project than the run's")] = None,
    entity: Annotated[str | None, typer.Option(help="another user or team than the run's")] = None,
) -> None:
    """Make the W&B runs of run folders from their files; doing it again makes the same runs again."""
    from quasar.results.wandb.pushing import push_all

    given = {"mode": mode, "project": project, "entity": entity}
    try:
        failed = push_all(folder, {key: value for key, value in given.items() if value is not None}, Reporter())
    except QuasarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    raise typer.Exit(1 if failed else 0)


@kept.command("list")
def list_cache() -> None:
    """Name what the cache holds, by kind."""
    from quasar.cache import cache_folder, kinds

    reporter = Reporter()
    rows = [(kind.name, str(kind.entries), f"{kind.bytes / 1e6:.1f}") for kind in kinds()]
    reporter.table(str(cache_folder()), ("kind", "entries", "MB"), rows)


@kept.command("size")
def cache_size() -> None:
    """Print the bytes of all that the cache holds."""
    from quasar.cache import kinds

    Reporter().line(str(sum(kind.bytes for kind in kinds())))


@kept.command("clear")
def clear_cache(
    kind: Annotated[str | None, typer.Argument(help="one kind of quasar cache list; default: all")] = None,
) -> None:
    """Delete what the cache holds, except what a running process is making."""
    from quasar.cache import clear

    try:
        freed = clear(kind)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    Reporter().line(f"freed {freed / 1e6:.1f} MB")


def model_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "model").glob("*.yaml"))


def model_source(name: str, path: str | None = None) -> ModelSource:
    """The model node of the configuration. Raises RequestError for an unknown name."""
    register()
    overrides = [f"model={name}"] + ([f"model.path={path}"] if path else [])
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=overrides)
    except MissingConfigException:
        raise RequestError(f"model {name!r} is not in conf/model; there are {', '.join(model_names())}") from None
    source = OmegaConf.to_object(config.model)
    assert isinstance(source, ModelSource)
    return source
