"""Measures the time of each decoding phase without a device synchronization per step."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

DECODE_PHASES = ("draft", "verify", "overhead", "observe")
"""Phases of a step: propose, verification pass, acceptance and bookkeeping, the drafter's observe."""
PHASES = ("prefill", *DECODE_PHASES)


class Stopwatch:
    """Measures consecutive laps of named phases; the durations are read once at the end.

    On a CPU each lap reads the clock. On CUDA each lap records an event in the stream, so that the durations are
    measured on the device, and only reading them waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._start = self._now()

    def lap(self, phase: str) -> None:
        """End the phase that began at the previous lap and give it a name."""
        self._marks.append((phase, self._now()))

    def milliseconds(self) -> dict[str, list[float]]:
        """Return the duration of every lap in milliseconds, by phase, in order."""
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
