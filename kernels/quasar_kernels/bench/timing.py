"""Timing shared by the benchmarks: alternating calls and data that no cache holds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

ROTATED_BYTES = 160 << 20
"""Data of all contenders together that is read between two uses of the same copy: several last-level caches."""
WARM_UP_ROUNDS = 2


def copies_of(round_bytes: float) -> int:
    """How many copies of data that takes ``round_bytes`` a round keep it out of the caches until its next turn."""
    return max(2, math.ceil(ROTATED_BYTES / round_bytes))


def alternating_medians(contenders: Sequence[Sequence[Callable[[], object]]], repetitions: int) -> list[float]:
    """Median seconds of each contender, all taking turns call by call; each call works on its next copy of the data."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(WARM_UP_ROUNDS + repetitions):
        for index, calls in enumerate(contenders):
            times[index].append(_seconds(calls[turn % len(calls)]))
    return [statistics.median(one[WARM_UP_ROUNDS:]) for one in times]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
