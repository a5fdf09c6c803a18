"""The results of `quasar simulate`: simulation.parquet, with one row per drafter, slope and prompt, and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from quasar.results.files import write_atomically
from quasar.results.intervals import (
    Estimate,
    Statistic,
    Sums,
    estimate,
    mean_over_families,
    ratio_of_totals,
)
from quasar.results.markdown import markdown_table
from quasar.results.provenance import Provenance, read_provenance
from quasar.results.rows import read_rows, write_rows

SIMULATION, ENVIRONMENT, TABLE = "simulation.parquet", "environment.json", "table.md"
FOOTER_CHARACTERS = 118
LEGEND = (
    "A pass with M rows takes t(M) = 1 + slope (M - 1) in units of a pass with one row, and drafting takes no time. "
    "Speeds are means over the task families; brackets are 95 % intervals (BCa bootstrap over prompts).\n\n"
    "- over AR: emitted tokens over the time of the steps.\n"
    "- over the first: the speed over that of the first drafter on the same prompts.\n"
    "- τ: tokens per step, the bonus token included.\n"
    "- rows: mean number of rows per pass.\n"
    "- of oracle: time of the passes if every draft had had only its accepted tokens, over the time that they took."
)


@dataclass(frozen=True)
class Simulated:
    """Sums over the steps of all answers to one prompt.

    slope: time of a further row; times are in units of a pass with one row
    time: that of all passes
    oracle_time: that of all passes if every draft had had only its accepted tokens
    """

    drafter: str
    slope: float
    family: str
    question: str
    steps: int
    emitted: int
    drafted: int
    accepted: int
    time: float
    oracle_time: float


def publish_simulation(folder: Path, rows: pd.DataFrame, provenance: Provenance) -> list[Path]:
    """Write the results and their tables into ``folder``. Returns all files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / SIMULATION)
    provenance.write(folder / ENVIRONMENT)
    return [folder / SIMULATION, folder / ENVIRONMENT, redraw_simulation(folder)]


def redraw_simulation(folder: Path) -> Path:
    """Write table.md from the results in a folder. Raises RequestError if a file is missing or damaged."""
    write_atomically(
        folder / TABLE, simulation_document(read_rows(folder / SIMULATION), read_provenance(folder / ENVIRONMENT))
    )
    return folder / TABLE


def simulation_document(rows: pd.DataFrame, provenance: Provenance) -> str:
    """Return the content of table.md."""
    parts = ["# Simulated drafters"]
    parts += [f"## {title}\n\n{markdown_table(headings, lines)}" for title, headings, lines in sections(rows)]
    return "\n\n".join([*parts, LEGEND, "\n".join(provenance.footer(FOOTER_CHARACTERS))]) + "\n"


def sections(rows: pd.DataFrame) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """Yield title, headings and lines of the tables: one per slope, and one of the speeds by task family."""
    headings = ["drafter", "over AR", "over the first", "τ", "rows", "of oracle"]
    for slope, table in rows.groupby("slope", sort=False):
        first = table[table.drafter == table.drafter.iloc[0]]
        lines = [[str(name), *_cells(own, first)] for name, own in table.groupby("drafter", sort=False)]
        yield f"Slope {slope:g}", headings, lines
    for slope, table in rows.groupby("slope", sort=False):
        families = sorted(set(rows.family))
        lines = [
            [str(name), *(f"{_total(own[own.family == family]):.2f}" for family in families)]
            for name, own in table.groupby("drafter", sort=False)
        ]
        yield f"Over AR by task family, slope {slope:g}", ["drafter", *families], lines


def _cells(own: pd.DataFrame, first: pd.DataFrame) -> list[str]:
    def estimated(statistic: Statistic, table: pd.DataFrame = own) -> Estimate:
        names = ("steps", "emitted", "rows", "time", "oracle_time", "first_emitted", "first_time")
        columns = {name: table[[name]].to_numpy(dtype=float) for name in names if name in table}
        return estimate(columns, table.family.tolist(), statistic)

    own = own.assign(rows=own.drafted + own.steps)
    pairs = own.merge(first[["question", "emitted", "time"]], on="question", suffixes=("", "_first"))
    pairs = pairs.rename(columns={"emitted_first": "first_emitted", "time_first": "first_time"})
    return [
        estimated(mean_over_families("emitted", "time"), own).text("{:.3f}".format),
        estimated(_over_first, pairs).text("{:.3f}".format),
        f"{estimated(mean_over_families('emitted', 'steps'), own).value:.2f}",
        f"{estimated(ratio_of_totals('rows', 'steps'), own).value:.2f}",
        f"{estimated(ratio_of_totals('oracle_time', 'time'), own).value:.0%}",
    ]


def _over_first(sums: Sums) -> np.ndarray:
    speeds = [mean_over_families(f"{who}emitted", f"{who}time")(sums) for who in ("", "first_")]
    quotient: np.ndarray = speeds[0] / speeds[1]
    return quotient


def _total(rows: pd.DataFrame) -> float:
    return float(rows.emitted.sum() / rows.time.sum())
