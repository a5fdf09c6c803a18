"""The time of a verification pass by its number of rows, as a run has timed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quasar.results.schema import PassRecord


@dataclass(frozen=True, eq=False)
class PassCurve:
    """Medians over repetitions behind one context. rows: ascending, from 1; milliseconds: of a pass with these rows."""

    rows: np.ndarray
    milliseconds: np.ndarray

    def at(self, rows: np.ndarray) -> np.ndarray | None:
        """Return t(rows), linear between the measured numbers of rows; None if one of them is beyond these."""
        if rows.max(initial=1) > self.rows[-1]:
            return None
        found: np.ndarray = np.interp(rows, self.rows, self.milliseconds)
        return found


def pass_curve(passes: Sequence[PassRecord], context: float) -> PassCurve | None:
    """Return the curve behind the measured context that is nearest to ``context``; None if no pass was timed."""
    if not passes:
        return None
    nearest = min({record.context for record in passes}, key=lambda found: abs(math.log(found / max(context, 1.0))))
    times: dict[int, list[float]] = {}
    for record in passes:
        if record.context == nearest:
            times.setdefault(record.rows, []).append(record.pass_ms)
    rows = sorted(times)
    return PassCurve(np.array(rows), np.array([float(np.median(times[count])) for count in rows]))
