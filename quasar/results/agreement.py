"""Compares a repetition of an experiment with the committed results: do the intervals overlap?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from quasar.results.intervals import Estimate
from quasar.results.quantities import QUANTITIES, estimates


@dataclass(frozen=True)
class Agreement:
    """One quantity of one arm in two sets of results.

    overlaps: whether the 95 % intervals have a point in common; None if either has no interval
    """

    arm: str
    quantity: str
    committed: Estimate
    repeated: Estimate

    @property
    def overlaps(self) -> bool | None:
        bounds = (self.committed.low, self.committed.high, self.repeated.low, self.repeated.high)
        if None in bounds:
            return None
        low, high, repeated_low, repeated_high = (bound for bound in bounds if bound is not None)
        return low <= repeated_high and repeated_low <= high

    def cells(self) -> list[str]:
        """Return the line of a table: arm, quantity, both values and the verdict."""
        quantity = QUANTITIES[self.quantity]
        verdict = {True: "overlap", False: "DIFFER", None: "no interval"}[self.overlaps]
        return [self.arm, quantity.heading, quantity.text(self.committed), quantity.text(self.repeated), verdict]


def agreements(committed: pd.DataFrame, repeated: pd.DataFrame, names: Sequence[str]) -> list[Agreement]:
    """Compare the quantities of every arm and condition that both sets of rows have."""
    theirs = {(group.arm, *group.conditions.values()): values for group, values in estimates(repeated, names)}
    found = []
    for group, ours in estimates(committed, names):
        other = theirs.get((group.arm, *group.conditions.values()), {})
        for name in names:
            first, second = ours[name], other.get(name)
            if first is not None and second is not None:
                temperature = group.conditions["temperature"]
                found.append(Agreement(f"{group.arm}, T = {temperature}", name, first, second))
    return found
