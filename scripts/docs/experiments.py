"""The table of the experiments in conf/experiment, for README files and pages."""

from __future__ import annotations

from pathlib import Path

from quasar.experiment.catalogue import entries
from quasar.results.markdown import markdown_table
from quasar.results.publish import TABLE

ROOT = Path(__file__).parents[2]


def table() -> str:
    """Return every experiment, the first sentence of its file, and whether its results are committed."""
    lines = [
        [f"`{entry.name}`", entry.sentence, "yes" if (ROOT / "experiments" / entry.name / TABLE).is_file() else "no"]
        for entry in entries("experiment")
    ]
    return markdown_table(["experiment", "question", "committed"], lines, text=3)
