"""The table of runs that ``quasar collect`` prints: one row per run, one column per metric or configuration key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from quasar.errors import RequestError
from quasar.results import metrics
from quasar.results.collect import csv_text, tabulate
from quasar.results.console import Reporter
from quasar.results.labels import arm_names
from quasar.results.layout import Column
from quasar.results.markdown import markdown_table
from quasar.results.metric import MISSING, Metric
from quasar.results.runs import StoredRun

MOST_RUNS = 40
"""Rows of the table if the user has chosen neither its columns nor its order."""

Format = Literal["table", "markdown", "csv", "spec-bench", "specdec-bench"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Choice:
    """What the user wants to see of the runs.

    columns: names of metrics or of other columns of the collected table, the most important first; empty: the metrics
        of `quasar.results.metrics.ranked`
    sort: the column to sort by, with a minus sign in front for the largest first; None: the order of the folders
    """

    columns: tuple[str, ...] = ()
    sort: str | None = None
    format: Format = "table"

    @property
    def is_default(self) -> bool:
        return self == Choice()

    @classmethod
    def parsed(cls, columns: str | None, sort: str | None, form: str) -> Choice:
        """Read the options of the command line. Raises RequestError for an unknown format."""
        chosen = next((known for known in FORMATS if known == form), None)
        if chosen is None:
            raise RequestError(f"--format {form}: must be one of {', '.join(FORMATS)}")
        names = [name.strip() for name in (columns or "").split(",")]
        return cls(tuple(name for name in names if name), sort or None, chosen)


def print_runs(runs: Sequence[StoredRun], root: Path, choice: Choice, reporter: Reporter) -> None:
    """Print the runs as ``choice`` says: all of them, or by default the finished ones, at most `MOST_RUNS`.

    Raises RequestError if a column is neither a metric nor one of the collected table.
    """
    if choice.is_default:
        runs = [run for run in runs if run.status == "done"]
    if not runs:
        return
    table = tabulate(runs, root)
    table.insert(1, "arm", pd.Series(_arms(runs), dtype="string"))
    names = [_known("--columns", name, table) for name in choice.columns]
    names = names or [metric.name for metric in metrics.METRICS if metric.rank is not None]
    if choice.sort is not None:
        table = _sorted(table, choice.sort)
    shown = table.head(MOST_RUNS) if choice.is_default else table
    leading = ["run", "arm", *(["status"] if (shown["status"] != "done").any() else [])]
    names = [*leading, *(name for name in names if name not in leading)]
    emulated = table.reindex(columns=["run", "emulated"]).query("emulated == True")["run"].tolist()
    if choice.format == "csv":
        parts = [column for name in names for column in _parts(name)]
        reporter.line(csv_text(shown.reindex(columns=parts)).rstrip("\n"))
    elif choice.format == "markdown":
        columns = [_column(shown, name, None) for name in names]
        rows = list(zip(*(column.cells for column in columns), strict=True))
        reporter.line(markdown_table([column.heading for column in columns], rows))
    else:
        ranks = {name: place for place, name in enumerate(choice.columns or _default_order(), start=1)}
        columns = [_column(shown, name, ranks.get(name)) for name in names]
        reporter.fitted_table("runs", columns, "--format csv and the written table have them")
        if len(shown) < len(table):
            reporter.line(f"... {len(table) - len(shown)} more runs in the written table")
        if emulated:
            reporter.line(f"no speedups: {', '.join(emulated)} (the machine emulates the verifier's number format)")


def _default_order() -> list[str]:
    return [metric.name for metric in metrics.ranked()]


def _arms(runs: Sequence[StoredRun]) -> list[str | None]:
    """Return the name of each run's arm; None for a run that ended before it wrote its configuration."""
    configured = [run for run in runs if run.config]
    names = dict(zip((run.folder for run in configured), arm_names(configured), strict=True))
    return [names.get(run.folder) for run in runs]


def _known(option: str, name: str, table: pd.DataFrame) -> str:
    """Return the name. Raises RequestError if it is no column."""
    columns = list(dict.fromkeys([*(metric.name for metric in metrics.METRICS if metric.in_summary), *table.columns]))
    if name in columns:
        return name
    near = difflib.get_close_matches(name, columns, 3, 0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise RequestError(f"{option} {name}: no such column; {meant}The columns are {', '.join(columns)}")


def _sorted(table: pd.DataFrame, sort: str) -> pd.DataFrame:
    """Return the table in the order of a column. Runs without a value come last."""
    name = _parts(_known("--sort", sort.removeprefix("-"), table))[0]
    if name not in table.columns:
        return table
    return table.sort_values(name, ascending=not sort.startswith("-"), na_position="last", kind="stable")


def _metric(name: str) -> Metric | None:
    return next((metric for metric in metrics.METRICS if metric.name == name), None)


def _parts(name: str) -> list[str]:
    """Return the columns of the collected table that belong to a metric or column."""
    metric = _metric(name)
    return [name] if metric is None else list(metric.columns(None))


def _column(table: pd.DataFrame, name: str, rank: int | None) -> Column:
    """Return the column with its values as text."""
    metric, parts = _metric(name), _parts(name)
    values = [[_value(table, part, row) for part in parts] for row in table.index]
    if metric is None:
        cells = [MISSING if found[0] is None else str(found[0]) for found in values]
    else:
        entries = [None if None in found else found if metric.parts else found[0] for found in values]
        cells = [metric.text(entry) for entry in entries]
    is_text = all(part not in table.columns or table[part].dtype == "string" for part in parts)
    return Column((metric.heading if metric else "") or name, tuple(cells), rank, is_text)


def _value(table: pd.DataFrame, column: str, row: Any) -> Any:
    """Return one value; None if it is missing."""
    if column not in table.columns:
        return None
    value: Any = table.at[row, column]
    return None if not isinstance(value, list) and pd.isna(value) else value
