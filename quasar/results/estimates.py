"""How a quantity is estimated from the rows of an experiment, and how rows are grouped into arms.

A quantity of one arm is computed from the arm's rows alone. One that compares an arm with the unquantized verifier and
the same drafter, such as the interaction, uses the rows of both, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from quasar.results.intervals import Estimate, Statistic, estimate
from quasar.results.metric import MISSING
from quasar.results.rows import CONDITIONS

UNQUANTIZED = "fp16"
"""The verifier that speculation alone is measured with."""
_PLACE = ["family", "question", "repetition"]
"""The columns that identify a row within an arm."""
PARTNER = "partner_"
"""What the columns of that arm begin with in a row of another arm."""


def times(value: float) -> str:
    """Write a ratio of times or speeds."""
    return f"{value:.2f}x"


@dataclass(frozen=True)
class Quantity:
    """Something that is estimated from rows.

    columns: the columns of the rows that it is computed from; ``partner_X`` is column X of the arm with the
        unquantized verifier and the same drafter, temperature and lengths
    statistic: computes it from sums
    form: formats a value
    meaning: one sentence for the documentation and for the legends of tables
    derive: adds columns that are computed per row
    """

    name: str
    heading: str
    columns: tuple[str, ...]
    statistic: Statistic
    form: Callable[[float], str]
    meaning: str
    derive: Callable[[pd.DataFrame], pd.DataFrame] | None = None

    @property
    def is_speedup(self) -> bool:
        """Whether it is a ratio of times or speeds, where 1 means no difference."""
        return self.form is times

    @property
    def pairs_arms(self) -> bool:
        return any(column.startswith(PARTNER) for column in self.columns)

    def of(self, rows: pd.DataFrame, all_rows: pd.DataFrame | None = None) -> Estimate | None:
        """Estimate the quantity over the rows of one arm (or of one arm and family).

        all_rows: the rows of all arms, for quantities that compare two

        Returns None if the rows do not have what it needs. A repetition in which no prompt was measured does not
        count, and a prompt that lacks a value in one of the others is left out.
        """
        table = rows
        if self.pairs_arms:
            partner = None if all_rows is None else partner_rows(rows, all_rows)
            if partner is None:
                return None
            table = rows.merge(partner, on=_PLACE)
        if self.derive is not None:
            table = self.derive(table)
        if table.empty or not set(self.columns) <= set(table.columns):
            return None
        wide = table[[*_PLACE, *self.columns]].set_index(_PLACE).astype(float).unstack()
        by_column = {column: wide[column].to_numpy() for column in self.columns}
        measured = np.logical_and.reduce([np.isfinite(values) for values in by_column.values()])
        repetitions = measured.any(axis=0)
        complete = measured[:, repetitions].all(axis=1)
        if not repetitions.any() or not complete.any():
            return None
        columns = {column: values[complete][:, repetitions] for column, values in by_column.items()}
        families = wide.index.get_level_values("family")[complete]
        return estimate(columns, list(families), self.statistic)

    def text(self, found: Estimate | None) -> str:
        """Return a value with its interval, or the sign for a missing one."""
        return MISSING if found is None or not np.isfinite(found.value) else found.text(self.form)


def partner_rows(rows: pd.DataFrame, all_rows: pd.DataFrame) -> pd.DataFrame | None:
    """Return the rows of the arm with the unquantized verifier and otherwise the same settings, renamed; None if
    there is no such arm.
    """
    first = rows.iloc[0]
    same = all_rows["verifier"] == UNQUANTIZED
    for column in CONDITIONS:
        same &= all_rows[column] == first[column]
    partner = all_rows[same]
    if partner.empty:
        return None
    return partner.drop_duplicates(_PLACE).rename(
        columns={name: f"{PARTNER}{name}" for name in partner if name not in _PLACE}
    )


@dataclass(frozen=True)
class Group:
    """The rows of one arm under the same conditions, which are one line of a table or one mark of a figure."""

    arm: str
    conditions: dict[str, object]
    rows: pd.DataFrame

    @property
    def verifier(self) -> str:
        return str(self.rows["verifier"].iloc[0])


def groups(rows: pd.DataFrame) -> list[Group]:
    """Split rows by arm and conditions (`quasar.results.rows.CONDITIONS`), in order of appearance."""
    return [
        Group(str(key[0]), dict(zip(CONDITIONS, key[1:], strict=True)), found)
        for key, found in rows.groupby(["arm", *CONDITIONS], sort=False, dropna=False)
    ]


def varying_conditions(rows: pd.DataFrame) -> list[str]:
    """Return the conditions that have more than one value in these rows."""
    return [name for name in CONDITIONS if rows[name].nunique(dropna=False) > 1]
