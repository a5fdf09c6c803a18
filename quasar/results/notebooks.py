"""What the notebooks call, and their execution: `overview` and `show` in a notebook, `execute` on the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from quasar.errors import QuasarError, RequestError
from quasar.results.estimates import varying_conditions
from quasar.results.provenance import Provenance
from quasar.results.quantities import QUANTITIES, estimates

RESULTS_VARIABLE = "RESULTS"
"""The environment variable with the folder of results that notebooks read."""
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def overview(rows: pd.DataFrame, quantities: Sequence[str], family: str | None = None) -> pd.DataFrame:
    """Return a table with a line per arm and condition and a column per quantity, each value with its interval.

    family: a task family; None takes all prompts
    """
    chosen = rows if family is None else rows[rows["family"] == family]
    conditions = varying_conditions(rows)
    lines = [
        {
            "arm": group.arm,
            **{name: group.conditions[name] for name in conditions},
            **{QUANTITIES[name].heading: QUANTITIES[name].text(value) for name, value in found.items()},
        }
        for group, found in estimates(chosen, quantities)
    ]
    return pd.DataFrame(lines).set_index("arm")


def show(figure: str, rows: pd.DataFrame, provenance: Provenance) -> Any:
    """Return a figure, which the notebook shows as a picture, or the sentence why these results do not allow it."""
    from quasar.results.figures import picture

    try:
        return picture(figure, rows, provenance)
    except RequestError as error:
        return f"This figure cannot be drawn from these results. {error}."


def execute(notebook: Path, results: Path | None = None) -> None:
    """Execute a notebook and store it with its outputs. The same results give the same bytes.

    results: folder that it reads; None keeps the one that the notebook names

    Raises QuasarError with the message of a cell that failed. The file is then unchanged.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    content = nbformat.read(notebook, as_version=4)
    environment = dict(os.environ)
    if results is not None:
        environment[RESULTS_VARIABLE] = str(results.resolve())
    client = NotebookClient(
        content,
        timeout=600,
        kernel_name="python3",
        # Times of execution would change the file at every execution.
        record_timing=False,
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raise QuasarError(f"{notebook}: {error.ename}: {error.evalue}") from None
    content.metadata = nbformat.from_dict(_METADATA)
    for cell in content.cells:
        cell.metadata = nbformat.from_dict({})
    nbformat.write(content, notebook)
