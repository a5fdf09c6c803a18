"""Bounds the time that is spent on trying out again what does not pay at present."""

from __future__ import annotations

SHARE = 0.01
"""Share of the decode time that probes may cost. Each of two conditions with its own credit may spend this much."""


class ProbeCredit:
    """A budget of milliseconds for probes: a share of the time of all steps without one.

    A drafter whose drafts do not pay would never learn that they pay again, because it makes none. So it makes one from
    time to time, which costs the difference between a step with and a step without this draft. The credit decides how
    often: a probe that costs 6 % of a step comes every 6 steps, one that costs 75 % every 75 steps.

    Example with a share of 1 %: after 30 steps of 10 ms there are 3 ms of credit. A probe that costs 2 ms is affordable
    and leaves 1 ms; the next one comes after another ten steps.
    """

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._milliseconds = 0.0

    def earn(self, milliseconds: float, cost: float) -> None:
        """Add the credit for a step of this duration. At most the ``cost`` of one probe is saved."""
        self._milliseconds = min(self._milliseconds + self._share * milliseconds, max(cost, 0.0))

    def affords(self, cost: float) -> bool:
        """Whether the credit covers a probe that costs so many milliseconds."""
        return self._milliseconds >= cost

    def spend(self, cost: float) -> None:
        self._milliseconds -= cost
