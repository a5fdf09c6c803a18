"""The committed results of an experiment: results.parquet and environment.json, and what is drawn from them.

`publish` writes all files of a folder in experiments/, `redraw` draws table.md and the figures again from the first
two. Drawing the same results gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from quasar.config.schema import PublishConfig
from quasar.errors import RequestError
from quasar.results.provenance import Provenance, read_provenance
from quasar.results.rows import read_rows, write_rows
from quasar.results.store import write_atomically
from quasar.results.tables import document

RESULTS, ENVIRONMENT, TABLE = "results.parquet", "environment.json", "table.md"


def publish(
    folder: Path, rows: pd.DataFrame, provenance: Provenance, spec: PublishConfig, complete: bool = True
) -> list[Path]:
    """Write an experiment's results into ``folder``, then its tables and figures. Returns all files.

    complete: whether every figure must be drawn; if not, those for which there are too few rows are left out
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / RESULTS)
    provenance.write(folder / ENVIRONMENT)
    return [folder / RESULTS, folder / ENVIRONMENT, *redraw(folder, spec, complete)]


def redraw(folder: Path, spec: PublishConfig, complete: bool = True) -> list[Path]:
    """Draw the tables and figures of an experiment from its results. Returns the files.

    Raises RequestError if a file is missing or damaged, or if a figure of ``complete`` results cannot be drawn.
    """
    rows, provenance = read_rows(folder / RESULTS), read_provenance(folder / ENVIRONMENT)
    table = folder / TABLE
    write_atomically(table, document(spec.tables, spec.by_family, rows, provenance))
    from quasar.results.figures import draw  # matplotlib takes a second to import

    files = [table]
    for name in spec.figures:
        try:
            files += draw([name], rows, provenance, folder)
        except RequestError:
            if complete:
                raise
    return files


def shortcomings(rows: pd.DataFrame, provenance: Provenance, spec: PublishConfig, repetitions: int) -> list[str]:
    """Return why results may not be committed as those of their experiment; an empty list if they may.

    repetitions: the number that the experiment declares
    """
    found = []
    if spec.prompts is not None:
        counts = rows.groupby("arm")["question"].nunique()
        short = [f"{arm} has {count}" for arm, count in counts.items() if count < spec.prompts]
        if short:
            found.append(f"{spec.prompts} prompts are declared for every arm, but {', '.join(short)}")
    if max(provenance.repetitions) < repetitions:
        found.append(f"{repetitions} repetitions are declared, but there are {max(provenance.repetitions)}")
    if provenance.git_commit is None:
        found.append("the code was in no git repository")
    if provenance.git_dirty:
        found.append("the code had uncommitted changes")
    return found


def require_committable(folder: Path, spec: PublishConfig, repetitions: int) -> None:
    """Raise RequestError, naming the reasons, if a folder's results may not be committed."""
    found = shortcomings(read_rows(folder / RESULTS), read_provenance(folder / ENVIRONMENT), spec, repetitions)
    if found:
        raise RequestError(f"{folder}: {'; '.join(found)}; run make reproduce EXPERIMENT={folder.name} again")
