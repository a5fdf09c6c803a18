"""What a metric is: a row of the table in `quasar.results.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from quasar.results.measured import Measured
from quasar.results.schema import Json

MISSING = "-"
"""Tables show this in place of a value that was not measured."""

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    name: its key in summary.json and its column in a table of runs
    compute: computes it from the records; returns None if the run did not measure it
    heading: heading of its column in printed tables
    form: formats a value for printed tables
    better: whether higher or lower values are better; None if neither is
    rank: its rank among the columns of printed tables, see `ranked`; None if it is not one of them
    in_summary: whether it is in summary.json; the others appear only in the notes below a run's table
    curve: name of its live curve in Weights & Biases
    config_key: configuration key with the same value, for runs that have not ended
    parts: names of the entries if the value is a list; each entry is a separate column in a table of runs
    """

    name: str
    compute: Callable[[Measured], Any]
    unit: str = ""
    heading: str = ""
    form: Callable[[Any], str] = str
    better: Better | None = None
    rank: int | None = None
    in_summary: bool = True
    curve: str | None = None
    config_key: str | None = None
    parts: tuple[str, ...] = ()

    def text(self, value: Any) -> str:
        """Return a value as printed tables show it."""
        return MISSING if value is None else self.form(value)

    def columns(self, value: Any) -> Json:
        """Return the metric's columns in a table of runs, with their values."""
        if not self.parts:
            return {self.name: value}
        values = [None] * len(self.parts) if value is None else value
        return {f"{self.name}_{part}": entry for part, entry in zip(self.parts, values, strict=True)}
