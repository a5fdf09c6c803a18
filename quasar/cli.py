"""The ``quasar`` command: starts runs, collects their results, and manages models, the cache and W&B runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException

from quasar.config.schema import CONF, ModelSource, check_model, register
from quasar.errors import QuasarError, RequestError
from quasar.results.console import Reporter

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Start runs and manage their results.")
models = typer.Typer(no_args_is_help=True, help="The models in conf/model.")
app.add_typer(models, name="models")
kept = typer.Typer(
    no_args_is_help=True, help="The cache of models, calibration statistics, reference answers and kernels."
)
app.add_typer(kept, name="cache")
wandb_runs = typer.Typer(no_args_is_help=True, help="Runs in Weights & Biases.")
app.add_typer(wandb_runs, name="wandb")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Decode prompts and measure. Takes the arguments of run.py, for example verifier=int4 drafter=lookahead."""
    from quasar.experiment.entry import guarded

    def program() -> int:
        from quasar.experiment.main import main

        return main()

    sys.argv = ["quasar run", *context.args]
    raise typer.Exit(guarded(program))


@models.command()
def fetch(
    name: Annotated[str, typer.Argument(help="a file in conf/model, without .yaml")],
    path: Annotated[str | None, typer.Option(help="a folder or GGUF file to use instead of the model's source")] = None,
) -> None:
    """Download and prepare a model before its first run."""
    reporter = Reporter()
    with _reported_errors():
        source = model_source(name, path)
        from quasar.model.sources import locate

        with reporter.stages() as stage:
            checkpoint = locate(source, stage)
    reporter.line(f"{name}: {checkpoint.origin}")
    reporter.line(f"in {checkpoint.folder}")


@models.command("list")
def list_models() -> None:
    """List every model in conf/model and its source."""
    reporter = Reporter()
    for name in model_names():
        source = model_source(name)
        reporter.line(f"{name:<16} {source.repo or source.source}")


@app.command("fidelity")
def fidelity_of(
    a: Annotated[str, typer.Argument(help="overrides of one verifier, such as 'verifier=fp16'")],
    b: Annotated[str, typer.Argument(help="overrides of another, such as 'verifier=packed verifier.path=FILE'")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides of both, such as model=tiny")] = None,
    text: Annotated[
        str | None, typer.Option(help="a plain text, or prompts as JSONL; default: the configuration's prompts")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="write the results to this file, too")] = None,
) -> None:
    """Compare two verifiers on the same text: KL(A || B), top-1 agreement, flips and both perplexities.

    Prompts are answered greedily by A, and B is teacher-forced along A's answers.
    """
    from quasar.experiment.fidelity import Request, measure_fidelity

    with _reported_errors():
        measure_fidelity(Request(a, b, overrides or [], text, output), Reporter())


@app.command("export")
def export_model(
    folder: Annotated[Path, typer.Argument(help="a new folder for the checkpoint")],
    overrides: Annotated[list[str], typer.Argument(help="overrides as for run.py, such as verifier=int8")],
) -> None:
    """Write a quantized or pruned verifier as a Hugging Face checkpoint (compressed-tensors, if it is quantized)."""
    from quasar.experiment.export import export_verifier

    with _reported_errors():
        export_verifier(folder, overrides, Reporter())


@app.command("collect")
def collect_runs(
    folder: Annotated[Path, typer.Argument(help="a sweep, or any folder above runs")],
    output: Annotated[Path | None, typer.Option(help="stem of the table's files; FOLDER/collected by default")] = None,
    watch: Annotated[bool, typer.Option(help="refresh a table of states until every run has ended")] = False,
    every: Annotated[float, typer.Option(help="seconds between refreshes")] = 5.0,
) -> None:
    """Write a table of all runs below a folder, as Parquet and CSV, and list the failed and partial runs."""
    from quasar.results.overview import collect, follow

    reporter = Reporter()
    with _reported_errors():
        if watch:
            follow(folder, every, reporter)
        collect(folder, output or folder / "collected", reporter)


@app.command("plot")
def plot_runs(
    folder: Annotated[Path, typer.Argument(help="an experiment's results, a sweep, or any folder above runs")],
    output: Annotated[Path | None, typer.Option(help="folder of the figures; FOLDER/figures by default")] = None,
) -> None:
    """Draw the figures that the results in a folder allow, as PDF, SVG and PNG."""
    from quasar.results.figures import draw_all
    from quasar.results.loading import load

    reporter = Reporter()
    with _reported_errors():
        files = draw_all(*load(folder), output or folder / "figures")
    for file in files:
        reporter.line(f"wrote {file}")


@app.command()
def reproduce(
    experiment: Annotated[str, typer.Argument(help="a file in conf/experiment, without .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="further overrides, as for run.py")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Spec-Bench JSONL, a file or folder; default: built-in")] = None,
    limit: Annotated[int | None, typer.Option(help="prompts per task family, instead of the declared number")] = None,
    repetitions: Annotated[int | None, typer.Option(help="repetitions, instead of the declared number")] = None,
) -> None:
    """Run an experiment's sweep and write its results, tables and figures. Continues an interrupted one."""
    from quasar.experiment.reproduce import reproduce as carry_out

    numbers = {"data.limit": limit, "evaluate.repetitions": repetitions}
    chosen = [f"{key}={value}" for key, value in numbers.items() if value is not None]
    with _reported_errors():
        carry_out(experiment, [*chosen, *(overrides or [])], prompts, Reporter())


@app.command()
def figures() -> None:
    """Draw the tables and figures of all results in experiments/ again."""
    from quasar.experiment.reproduce import redraw_all

    with _reported_errors():
        redraw_all(Reporter())


@app.command("notebooks")
def run_notebooks(
    notebooks: Annotated[list[Path], typer.Argument(help="the notebooks, such as notebooks/*.ipynb")],
    results: Annotated[
        Path | None, typer.Option(help="folder of results or runs; default: the one that each notebook names")
    ] = None,
) -> None:
    """Execute notebooks and store them with their outputs."""
    from quasar.results.notebooks import execute

    reporter = Reporter()
    with _reported_errors():
        for notebook in notebooks:
            execute(notebook, results)
            reporter.line(f"wrote {notebook}")


@wandb_runs.command("push")
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
    with _reported_errors():
        failed = push_all(folder, {key: value for key, value in given.items() if value is not None}, Reporter())
    raise typer.Exit(1 if failed else 0)


@kept.command("list")
def list_cache() -> None:
    """List the kinds of entries in the cache, with their number and size."""
    from quasar.cache import cache_folder, kinds

    reporter = Reporter()
    rows = [(kind.name, str(kind.entries), f"{kind.bytes / 1e6:.1f}") for kind in kinds()]
    reporter.table(str(cache_folder()), ("kind", "entries", "MB"), rows)


@kept.command("size")
def cache_size() -> None:
    """Print the size of the cache in bytes."""
    from quasar.cache import kinds

    Reporter().line(str(sum(kind.bytes for kind in kinds())))


@kept.command("clear")
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


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Print an error that the user can act on without its traceback, and exit with its code."""
    try:
        yield
    except QuasarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def model_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "model").glob("*.yaml"))


def model_source(name: str, path: str | None = None) -> ModelSource:
    """Return the model node of the configuration. Raises RequestError for an unknown name."""
    register()
    overrides = [f"model={name}"] + ([f"model.path={path}"] if path else [])
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=overrides)
    except MissingConfigException:
        raise RequestError(f"model {name!r} is not in conf/model; choose one of {', '.join(model_names())}") from None
    return check_model(config.model)
