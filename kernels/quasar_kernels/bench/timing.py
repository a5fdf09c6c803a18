"""Times alternating calls on data that is not in any cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

ROTATED_BYTES = 160 << 20
"""Bytes that all contenders together read between two uses of the same copy: several times the last-level cache."""
WARM_UP_ROUNDS = 2


def copies_of(round_bytes: float) -> int:
    """Return the number of copies with which data of ``round_bytes`` per round is not cached at its next use."""
    return max(2, math.ceil(ROTATED_BYTES / round_bytes))


def alternating_medians(contenders: Sequence[Sequence[Callable[[], object]]], repetitions: int) -> list[float]:
    """Return the median seconds of each contender. They take turns, and each call uses the next copy of the data."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(WARM_UP_ROUNDS + repetitions):
        for index, calls in enumerate(contenders):
            times[index].append(_seconds(calls[turn % len(calls)]))
    return [statistics.median(one[WARM_UP_ROUNDS:]) for one in times]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
