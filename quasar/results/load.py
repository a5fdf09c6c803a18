"""How busy the machine was while a run decoded: what other processes took of the cores that the run uses.

A sample adds up `/proc/stat` over the cores that this process may use. Between two samples, the CPU time that is
neither idle nor this process's own was taken by others. For example, in 10 s on two cores with 14 s busy and 11 s of
this process, others took 3 s: 15 % of the two cores, so that the run counts as disturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quasar.results.schema import Json

LOAD = "load"
"""Key of an attempt's load in environment.json."""
DISTURBED = 0.05
"""A run is disturbed if others took more than this share of the cores that it uses."""
SHORTEST_SECONDS = 2.0
"""Shorter intervals are not judged: the kernel counts in hundredths of a second, and spreads them unevenly."""
_STAT, _LOADAVG = Path("/proc/stat"), Path("/proc/loadavg")
_BUSY, _STEAL = ("user", "nice", "system", "irq", "softirq"), "steal"
_COLUMNS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Sample:
    """Counters since the machine or the process started, in seconds.

    at: monotonic clock
    busy: CPU time of all processes on the cores that this process may use
    steal: time in which a hypervisor ran another machine on them
    own: CPU time of this process and of the child processes that have ended
    load_average: mean number of runnable processes over the last minute
    """

    at: float
    busy: float
    steal: float
    own: float
    load_average: float


@dataclass(frozen=True)
class Load:
    """The load between two samples.

    cores: number of cores that the run uses
    other_cpu_share, steal_share: CPU time of other processes, and stolen time, over the time of these cores
    load_average: mean number of runnable processes over a minute, at the beginning and at the end
    """

    seconds: float
    cores: int
    other_cpu_share: float
    steal_share: float
    load_average: tuple[float, float]

    def to_json(self) -> Json:
        return {**asdict(self), "load_average": list(self.load_average)}


def sample() -> Sample | None:
    """Sample the machine's counters; None on a system without `/proc/stat`."""
    try:
        stat, loadavg = _STAT.read_text(), _LOADAVG.read_text()
    except OSError:
        return None
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return parsed(stat, loadavg, usable_cores(), own, time.monotonic())


def parsed(stat: str, loadavg: str, cores: Iterable[int], own: float, at: float) -> Sample:
    """Return the sample in the texts of `/proc/stat` and `/proc/loadavg`, over the numbered cores."""
    names = {f"cpu{core}" for core in cores}
    lines = [line.split() for line in stat.splitlines()]
    ticks = [dict(zip(_COLUMNS, map(int, line[1:]), strict=False)) for line in lines if line and line[0] in names]
    rate = os.sysconf("SC_CLK_TCK")
    busy = sum(found[name] for found in ticks for name in _BUSY) / rate
    return Sample(at, busy, sum(found.get(_STEAL, 0) for found in ticks) / rate, own, float(loadavg.split()[0]))


def between(begin: Sample | None, end: Sample | None, cores: int) -> Load | None:
    """Return the load between two samples; None if there are none, or less than `SHORTEST_SECONDS` between them.

    cores: number of threads that the run computes with
    """
    if begin is None or end is None or end.at - begin.at < SHORTEST_SECONDS:
        return None
    return load_of(begin, end, cores)


def load_of(begin: Sample, end: Sample, cores: int) -> Load:
    """Return the load between two samples on ``cores`` cores, however short the time between them is."""
    seconds = end.at - begin.at
    capacity = seconds * cores
    others = max(0.0, (end.busy - begin.busy) - (end.own - begin.own))
    return Load(
        seconds=round(seconds, 3),
        cores=cores,
        other_cpu_share=round(others / capacity, 4),
        steal_share=round(max(0.0, end.steal - begin.steal) / capacity, 4),
        load_average=(begin.load_average, end.load_average),
    )


def usable_cores() -> Sequence[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def worst_of(attempts: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the largest share that others took during an attempt of a run; None if no attempt measured it.

    attempts: those of environment.json
    """
    loads = [attempt[LOAD] for attempt in attempts if attempt.get(LOAD)]
    return max((max(load["other_cpu_share"], load["steal_share"]) for load in loads), default=None)
