"""Results from a folder: those of an experiment in experiments/, or runs that nobody has published yet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from quasar.results.collect import all_runs
from quasar.results.provenance import Provenance, provenance_of, read_provenance
from quasar.results.publish import ENVIRONMENT, RESULTS
from quasar.results.rows import read_rows, rows_of_runs


def load(folder: str | Path) -> tuple[pd.DataFrame, Provenance]:
    """Return the rows in a folder and their provenance.

    folder: one with results.parquet and environment.json, or any folder above runs, such as a sweep's

    Raises RequestError if there are neither, or if the runs are unfinished or not comparable.
    """
    folder = Path(folder)
    if (folder / RESULTS).is_file():
        return read_rows(folder / RESULTS), read_provenance(folder / ENVIRONMENT)
    runs = all_runs(folder)
    provenance = provenance_of(runs)
    return rows_of_runs(runs), provenance
