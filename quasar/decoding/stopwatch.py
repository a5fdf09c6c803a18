"""Where a decode's time goes, without a device synchronization per step."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

DECODE_PHASES = ("draft", "verify", "overhead", "observe")
"""Phases of a step: proposing, the verification pass, deciding and bookkeeping, the drafter's learning from it."""
PHASES = ("prefill", *DECODE_PHASES)


class Stopwatch:
    """Laps of named phases, one after the other; read once at the end.

    On a CPU a lap is a clock reading. On CUDA it is an event recorded in the stream, so that a phase's time is
    the device's, and reading waits for the device once.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._start = self._now()

    def lap(self, phase: str) -> None:
        """End the running phase, which began at the previous lap, and name it."""
        self._marks.append((phase, self._now()))

    def milliseconds(self) -> dict[str, list[float]]:
        """Duration of every lap, by phase, in order."""
        if self._cuda:
            torch.cuda.synchronize()
        laps: dict[str, list[float]] = defaultdict(list)
        previous = self._start
        for phase, mark in self._marks:
            laps[phase].append(_elapsed(previous, mark))
            previous = mark
        return laps

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return (end - start) * 1e3
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end)
