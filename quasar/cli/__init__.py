"""The ``quasar`` command: starts runs, shows their results, looks at the machine, and manages models and the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quasar.cli import cache, models, wandb
from quasar.cli.errors import reported_errors
from quasar.cli.models import model_names, model_source
from quasar.results.console import Reporter

__all__ = ["app", "model_names", "model_source"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Start runs and look at their results.")
app.add_typer(models.commands, name="models")
app.add_typer(cache.commands, name="cache")
app.add_typer(wandb.commands, name="wandb")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Decode prompts and measure. Takes the arguments of run.py, for example verifier=int4 drafter=lookahead."""
    from quasar.experiment.entry import guarded

    def program() -> int:
        from quasar.experiment.main import main

        return main()

    sys.argv = ["quasar run", *context.args]
    raise typer.Exit(guarded(program))


@app.command("list")
def list_choices(
    groups: Annotated[
        list[str] | None, typer.Argument(help="drafter, verifier, model, data or experiment; default: all")
    ] = None,
) -> None:
    """List what each group of the configuration offers, with one sentence each."""
    from quasar.experiment.catalogue import print_entries

    with reported_errors():
        print_entries(groups or [], Reporter())


@app.command("doctor")
def examine() -> None:
    """Check this machine: what works, what a run falls back to, and what to do. Exit code 1 if a run would fail."""
    from quasar.doctor.report import doctor

    with reported_errors():
        raise typer.Exit(0 if doctor(Reporter()) else 1)


@app.command("collect")
def collect_runs(
    folder: Annotated[Path, typer.Argument(help="a sweep, or any folder above runs")],
    output: Annotated[
        Path | None, typer.Option(help="stem of the table's files; FOLDER/collected by default. Of answers: a folder")
    ] = None,
    watch: Annotated[bool, typer.Option(help="refresh a table of states until every run has ended")] = False,
    every: Annotated[float, typer.Option(help="seconds between refreshes")] = 5.0,
    columns: Annotated[
        str | None, typer.Option(help="metrics or configuration keys, such as tokens_per_second,verifier.group_size")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="column to sort by; -NAME: the largest first")] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="table, markdown, csv, or files of another benchmark: spec-bench, specdec-bench"),
    ] = "table",
) -> None:
    """Write a table of all runs below a folder, as Parquet and CSV, and print the states and metrics of the runs."""
    from quasar.results.overview import collect, follow
    from quasar.results.run_table import Choice

    reporter = Reporter()
    with reported_errors():
        choice = Choice.parsed(columns, sort, form)
        if watch:
            follow(folder, every, reporter)
        collect(folder, output, choice, reporter)


@app.command("show")
def show_run(folder: Annotated[Path, typer.Argument(help="the folder of a run, finished or not")]) -> None:
    """Print a run's header, results and settings from its files."""
    from quasar.results.show import show

    with reported_errors():
        show(folder, Reporter())


@app.command("compare")
def compare_runs(
    folders: Annotated[
        list[Path], typer.Argument(help="folders of runs on the same prompts; the others are compared with the first")
    ],
) -> None:
    """Compare runs with the first one, prompt by prompt, with intervals of the differences."""
    from quasar.results.compare import compare

    with reported_errors():
        compare(folders, Reporter())


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

    with reported_errors():
        measure_fidelity(Request(a, b, overrides or [], text, output), Reporter())


@app.command("simulate")
def simulate_drafters(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="overrides of model, verifier and prompts, such as data.limit=4")
    ] = None,
    drafter: Annotated[
        list[str], typer.Option(help="overrides of a drafter, such as 'drafter=ngram drafter.num_tokens=8'; repeatable")
    ] = ["drafter=ngram", "drafter=mixture"],  # noqa: B006 (typer copies it)
    slope: Annotated[
        list[float], typer.Option(help="time of a further row over that of a pass with one row; repeatable")
    ] = [0.065, 0.01],  # noqa: B006
    skip: Annotated[int, typer.Option(min=0, help="prompts per task family to leave out, the first ones")] = 0,
    output: Annotated[Path | None, typer.Option(help="folder for the results, such as experiments/drafters")] = None,
) -> None:
    """Compare drafters on recorded answers, in seconds: τ, rows per pass and the speed for a given cost of a row.

    The first time the model answers the prompts, and also computes what it thinks of rejected drafts. All of this is
    recorded in outputs/recordings, so that the same drafters need no model again and others need it rarely.
    """
    from quasar.experiment.simulate import Request, simulate

    with reported_errors():
        simulate(Request(drafter, slope, overrides or [], skip, output), Reporter())


@app.command("export")
def export_model(
    folder: Annotated[Path, typer.Argument(help="a new folder for the checkpoint")],
    overrides: Annotated[list[str], typer.Argument(help="overrides as for run.py, such as verifier=int8")],
) -> None:
    """Write a quantized or pruned verifier as a Hugging Face checkpoint (compressed-tensors, if it is quantized)."""
    from quasar.experiment.export import export_verifier

    with reported_errors():
        export_verifier(folder, overrides, Reporter())


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def evaluate_tasks(context: typer.Context) -> None:
    """Evaluate tasks of the lm-evaluation-harness. Takes the arguments of lm_eval, which then knows --model quasar."""
    with reported_errors():
        # The import fails, and says why, if the harness is not installed.
        from quasar.experiment.harness import evaluate

        evaluate(context.args)


@app.command("plot")
def plot_runs(
    folder: Annotated[Path, typer.Argument(help="an experiment's results, a sweep, or any folder above runs")],
    output: Annotated[Path | None, typer.Option(help="folder of the figures; FOLDER/figures by default")] = None,
) -> None:
    """Draw the figures that the results in a folder allow, as PDF, SVG and PNG."""
    from quasar.results.figures import draw_all
    from quasar.results.loading import load

    reporter = Reporter()
    with reported_errors():
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
    with reported_errors():
        carry_out(experiment, [*chosen, *(overrides or [])], prompts, Reporter())


@app.command()
def figures() -> None:
    """Draw the tables and figures of all results in experiments/ again."""
    from quasar.experiment.reproduce import redraw_all

    with reported_errors():
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
    with reported_errors():
        for notebook in notebooks:
            execute(notebook, results)
            reporter.line(f"wrote {notebook}")
