"""Markdown tables of runs for experiments/. Their headings and formats come from the table of metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from quasar.results.metrics import named
from quasar.results.schema import Json


@dataclass(frozen=True)
class Column:
    """A column that is not a metric of a single run. cell: returns the text for a run's row, in which null is None."""

    heading: str
    cell: Callable[[Json], str]


def markdown(label: str, rows: Sequence[Json], columns: Sequence[str | Column]) -> list[str]:
    """Return the lines of a table with one row per run. A value that a run does not have is shown as missing.

    label: heading of the first column, and the key of its text in each row
    columns: names of metrics, or `Column` objects for columns that are not metrics
    """
    known = [_of_metric(column) if isinstance(column, str) else column for column in columns]
    lines = [
        f"| {label} | {' | '.join(column.heading for column in known)} |",
        f"| --- |{' ---: |' * len(known)}",
    ]
    return lines + [f"| {row[label]} | {' | '.join(column.cell(row) for column in known)} |" for row in rows]


def rows_of(runs: pd.DataFrame) -> list[Json]:
    """Return the rows of a table of runs, with None for null."""
    plain = runs.astype(object)
    plain = plain.where(plain.notna(), None)
    return [dict(zip(map(str, plain.columns), values, strict=True)) for values in plain.itertuples(index=False)]


def _of_metric(name: str) -> Column:
    metric = named(name)

    def cell(row: Json) -> str:
        values = [row.get(column) for column in metric.columns(None)]
        if None in values:
            return metric.text(None)
        return metric.text(values if metric.parts else values[0])

    return Column(metric.heading, cell)
