"""The footer of a figure, which states where its numbers come from, and the check that refuses runs not comparable."""

from __future__ import annotations

import textwrap

import pandas as pd

from quasar.errors import RequestError
from quasar.results.collect import JOINED
from quasar.results.metrics import named

SAME = {"code_version": "code versions", "machine": "machines", "model_origin": "model origins"}
"""Columns in which all runs of a figure must agree."""


def require_comparable(table: pd.DataFrame) -> None:
    """Raise RequestError, naming the reason, if runs are unfinished or differ in what must not differ.

    table: a row per run, as `quasar.results.collect.tabulate` makes it
    """
    unfinished = table[table["status"] != "done"]
    if len(unfinished):
        states = ", ".join(f"{run} ({status})" for run, status in unfinished[["run", "status"]].head(3).to_numpy())
        raise RequestError(
            f"{len(unfinished)} of {len(table)} runs are not done: {states}; finish or delete them, then draw again"
        )
    missing = [column for column in (*SAME, "weights_on_grid") if column not in table.columns]
    if missing:
        raise RequestError(
            f"the runs do not say their {', '.join(missing)}: an earlier version of the code made them; run them again"
        )
    for column, words in SAME.items():
        found = sorted(table[column].dropna().unique())
        mixed = [value for value in found if column != "model_origin" and JOINED in value]
        if len(found) > 1 or mixed:
            raise RequestError(f"the runs are of several {words}: {'; '.join(found)}; draw each one's runs apart")


def footer(table: pd.DataFrame, width: int) -> list[str]:
    """Code, machine, model and prompts of the runs, as lines of at most ``width`` characters."""
    first = table.iloc[0]
    parts = [f"code {first['code_version']}", first["machine"], f"{first['model']}: {first['model_origin']}"]
    if pd.notna(first["weights_on_grid"]):
        parts.append(f"{named('weights_on_grid').text(first['weights_on_grid'])} of its weights on a low-bit grid")
    fewest, most = table["prompts"].min(), table["prompts"].max()
    parts.append(f"n = {fewest} prompts" if fewest == most else f"n = {fewest} to {most} prompts")
    return textwrap.wrap("; ".join(parts), width)
