"""``window=auto`` of lookahead: chooses the window's width from what its n-grams contribute and what its rows cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quasar.drafters._pass_cost import PassCost
from quasar.drafters._probing import ProbeCredit

PERIOD = 8
"""Steps for which a width stays. A new window contributes nothing before it has run for N - 1 steps."""
DECAY = 0.98
"""Factor on the weight of older steps: about the last fifty count."""
FIRST_YIELD = 0.25
FIRST_WEIGHT = 8.0
"""The assumed yield per doubling before there is evidence, and its weight in doublings. It fades like older steps. The
authors report about twice the tokens per step for W = 15, which is one token per log2(16) = 4 doublings."""
REMEMBERED = 4.0
"""The weight in doublings that older evidence has against a probe."""


class WindowSize:
    """Chooses the width W of lookahead's window, from 0 (no window) on.

    Fu et al. (2024, section 4.1) find that the number of steps falls linearly with log(W). A window of width W is
    therefore expected to contribute y log2(1 + W) accepted tokens per step, where y is estimated from recent steps. W
    maximizes the expected tokens per second

        (a + y log2(1 + W)) / t(1 + n + s(W))

    where a are the tokens per step without the window's n-grams, n the draft tokens per step, s(W) the window's rows
    and t the measured time of a pass. W = 0 is tried again from time to time, within `ProbeCredit`.

    Example with s(W) = 3 W - 1, a = 1, n = 0 and t(M) = 10 + 0.65 (M - 1) ms: one column costs 1.3 ms, which pays from
    y = 0.13 on. If t does not depend on the rows, the widest window is chosen for any y.

    rows: s(W) for W = 0, 1, …, the widest window
    """

    def __init__(self, cost: PassCost, rows: Sequence[int]) -> None:
        self._cost, self._rows = cost, np.array(rows)
        self._doublings = np.log2(1 + np.arange(len(rows)))
        self._credit = ProbeCredit()
        self._found, self._effort = FIRST_WEIGHT * FIRST_YIELD, FIRST_WEIGHT
        self._steps, self._other_tokens, self._draft_rows = 1.0, 1.0, 0.0
        self._width, self._left = 0, 0

    def choose(self, context: int) -> int:
        """Return the width of the next step after ``context`` tokens."""
        if self._left == 0:
            self._width, self._left = self._best(context), PERIOD
        self._left -= 1
        return self._width

    def add(self, draft_rows: int, from_window: int, others: int) -> None:
        """Count a step with ``draft_rows`` draft tokens.

        from_window: accepted tokens of n-grams that only the window has found
        others: the other emitted tokens
        """
        self._steps = DECAY * self._steps + 1
        self._other_tokens = DECAY * self._other_tokens + others
        self._draft_rows = DECAY * self._draft_rows + draft_rows
        if self._width:
            self._found = DECAY * self._found + from_window
            self._effort = DECAY * self._effort + float(self._doublings[self._width])

    def _best(self, context: int) -> int:
        milliseconds = self._cost(1 + self._draft_rows / self._steps + self._rows, context)
        tokens = self._other_tokens / self._steps + self._found / self._effort * self._doublings
        rates = tokens / milliseconds
        best = int(rates.argmax())
        if best or len(rates) == 1:
            return best
        probe = int(rates[1:].argmax()) + 1
        extra = PERIOD * float(milliseconds[probe] - milliseconds[0])
        self._credit.earn(PERIOD * float(milliseconds[0]), extra)
        if not self._credit.affords(extra):
            return 0
        self._credit.spend(extra)
        faded = min(1.0, REMEMBERED / self._effort)
        self._found, self._effort = faded * self._found, faded * self._effort
        return probe
