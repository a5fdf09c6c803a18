"""Creates the W&B run that summarizes a sweep: its collected table, its figures and where the results come from."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quasar.errors import RequestError
from quasar.results.collect import tabulate
from quasar.results.figures import draw_all
from quasar.results.files import write_atomically
from quasar.results.provenance import provenance_of
from quasar.results.rows import rows_of_runs
from quasar.results.runs import StoredRun
from quasar.results.schema import Json
from quasar.results.wandb.log import open_run
from quasar.results.wandb.target import FOLDER, Target

SENTENCE_CHARACTERS = 100


def push_sweep(sweep: Path, runs: Sequence[StoredRun], target: Target) -> Json:
    """Create or update the W&B run of a sweep; return its mode, URL and local directory.

    runs: all runs of the sweep. If they are unfinished or not comparable, the W&B run has no figures, and its summary
        gives the reason

    Errors of wandb are passed on.
    """
    import wandb

    table = tabulate(runs, sweep)
    options = {
        "name": f"{sweep.absolute().name} (summary)",
        "group": sweep.absolute().name,
        "job_type": "summary",
        "tags": sorted({*target.tags, "summary"}),
        "config": {"experiment": runs[0].config.get("name"), "runs": len(runs)},
    }
    handle, place = open_run(sweep, sweep_id(sweep), target, options)
    try:
        # Nested values and missing ones have no type in a wandb.Table.
        plain = table.astype(object).where(table.notna(), None)
        cells: list[Iterable[Any]] = [
            [str(value) if isinstance(value, list) else value for value in row] for row in plain.values.tolist()
        ]
        entry: Json = {"runs": wandb.Table(columns=list(table.columns), data=cells)}
        summary: Json = {"states": table["status"].value_counts().to_dict()}
        with tempfile.TemporaryDirectory() as folder:
            try:
                provenance = provenance_of(runs)
                files = draw_all(rows_of_runs(runs), provenance, Path(folder))
                summary["provenance"] = "\n".join(provenance.footer(SENTENCE_CHARACTERS))
                entry |= {f"figures/{file.stem}": wandb.Image(str(file)) for file in files if file.suffix == ".png"}
            except RequestError as error:
                summary["no_figures"] = str(error)
            handle.log(entry)
        handle.summary.update(summary)
    finally:
        handle.finish()
    return place


def sweep_id(sweep: Path) -> str:
    """Return the id of a sweep's summary in W&B. It is drawn once and stays in the folder, wherever that is moved."""
    kept = sweep / FOLDER / "id"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        write_atomically(kept, uuid.uuid4().hex[:16])
    return kept.read_text().strip()
