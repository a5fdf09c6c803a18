"""The committed results of an experiment: results.parquet, passes.parquet if it timed passes, and environment.json.

`publish` writes all files of a folder in experiments/, `redraw` draws table.md and the figures again from
these. Drawing the same results gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from quasar.config.schema import PassesConfig, PublishConfig
from quasar.errors import RequestError
from quasar.results.files import write_atomically
from quasar.results.pass_rows import pass_shortcomings
from quasar.results.provenance import Provenance, read_provenance
from quasar.results.rows import read_rows, write_rows
from quasar.results.tables import document

RESULTS, PASSES, ENVIRONMENT, TABLE = "results.parquet", "passes.parquet", "environment.json", "table.md"


@dataclass(frozen=True)
class Experiment:
    """What an experiment of conf/experiment declares.

    publish: what it publishes
    repetitions: how often it decodes every prompt
    passes: the passes that it times
    """

    name: str
    publish: PublishConfig
    repetitions: int
    passes: PassesConfig


def publish(
    folder: Path,
    rows: pd.DataFrame,
    provenance: Provenance,
    spec: PublishConfig,
    *,
    complete: bool = True,
    passes: pd.DataFrame | None = None,
) -> list[Path]:
    """Write an experiment's results into ``folder``, then its tables and figures. Returns all files.

    complete: whether every figure must be drawn; if not, those for which there are too few rows are left out
    passes: the timed passes; None if the experiment times none
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {RESULTS: rows} if passes is None else {RESULTS: rows, PASSES: passes}
    for name, table in written.items():
        write_rows(table, folder / name)
    if passes is None:
        (folder / PASSES).unlink(missing_ok=True)
    provenance.write(folder / ENVIRONMENT)
    return [*(folder / name for name in written), folder / ENVIRONMENT, *redraw(folder, spec, complete)]


def read_published_passes(folder: Path) -> pd.DataFrame | None:
    """Return the timed passes of an experiment's results; None if it has timed none."""
    return read_rows(folder / PASSES) if (folder / PASSES).is_file() else None


def redraw(folder: Path, spec: PublishConfig, complete: bool = True) -> list[Path]:
    """Draw the tables and figures of an experiment from its results. Returns the files.

    Raises RequestError if a file is missing or damaged, or if a figure of ``complete`` results cannot be drawn.
    """
    rows, provenance = read_rows(folder / RESULTS), read_provenance(folder / ENVIRONMENT)
    passes = read_published_passes(folder)
    files = [folder / TABLE]
    write_atomically(files[0], document(spec.tables, spec.by_family, rows, provenance, spec.pass_tables, passes))
    # matplotlib takes a second to import.
    from quasar.results.figures import draw
    from quasar.results.figures.memory_wall import draw_passes

    files += draw(spec.figures, rows, provenance, folder, complete)
    if passes is not None:
        files += draw_passes(spec.pass_figures, passes, rows, provenance, folder)
    return files


def shortcomings(
    rows: pd.DataFrame, passes: pd.DataFrame | None, provenance: Provenance, experiment: Experiment
) -> list[str]:
    """Return why results may not be committed as those of their experiment; an empty list if they may."""
    spec, repetitions = experiment.publish, experiment.repetitions
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
    return found + pass_shortcomings(passes, experiment.passes)


def require_committable(folder: Path, experiment: Experiment) -> None:
    """Raise RequestError, naming the reasons, if a folder's results may not be committed."""
    rows, passes = read_rows(folder / RESULTS), read_published_passes(folder)
    found = shortcomings(rows, passes, read_provenance(folder / ENVIRONMENT), experiment)
    if found:
        raise RequestError(f"{folder}: {'; '.join(found)}; run make reproduce EXPERIMENT={folder.name} again")
