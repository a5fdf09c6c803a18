"""Measures the time of a verification pass as a function of its rows, for drafters that weigh a draft against it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch

from quasar.decoding.draft import MAX_ROWS, Draft
from quasar.verifiers.base import Verifier
from quasar.verifiers.timing import pass_milliseconds

MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, MAX_ROWS)
REPEATS = 5
"""Passes timed per number of rows; the median is used."""
LONG_CONTEXT = 1024
SECONDS = 4.0
"""Time after which no further round of passes is started, for models whose passes are slow."""


@dataclass(frozen=True)
class PassCost:
    """Milliseconds t(M) of a verification pass as a function of its number of rows M and the context length.

    rows: the measured numbers of rows, ascending
    contexts: the measured context lengths in tokens, ascending, at least one
    milliseconds: for every context length, the durations by number of rows
    """

    rows: Sequence[int]
    contexts: Sequence[int]
    milliseconds: Sequence[Sequence[float]]

    def __call__(self, rows: np.ndarray, context: int) -> np.ndarray:
        """Return t(M) for every number of rows, which may be fractional; linear between and beyond measured points."""
        times = self._behind(0, rows)
        if len(self.contexts) == 1:
            return times
        # Attention reads the whole context, so the cost of a row grows with the context length.
        share = (context - self.contexts[0]) / (self.contexts[-1] - self.contexts[0])
        return np.maximum(times + share * (self._behind(-1, rows) - times), min(self.milliseconds[0]))

    def _behind(self, index: int, rows: np.ndarray) -> np.ndarray:
        known = self.milliseconds[index]
        slope = max(0.0, (known[-1] - known[-2]) / (self.rows[-1] - self.rows[-2]))
        return np.interp(rows, self.rows, known) + slope * np.maximum(0.0, rows - self.rows[-1])


FREE_ROWS = PassCost((1, MAX_ROWS), (1,), ((1.0, 1.0),))
"""The cost that drafters assume before `prepare` has given them the measured one."""


def measure_pass_cost(verifier: Verifier, prompt: Sequence[int], capacity: int) -> PassCost:
    """Measure passes of 1 to 64 rows after a prompt, and after the prompt repeated up to a long context.

    The verifier's cache contains only the prompt afterwards.

    capacity: size of the verifier's cache in tokens; if a long context does not fit, only the prompt is measured
    """
    long = min(LONG_CONTEXT, capacity - MEASURED_ROWS[-1])
    contexts = [len(prompt), long] if long > 2 * len(prompt) else [len(prompt)]
    measured = {length: _pass_milliseconds(verifier, list(islice(cycle(prompt), length))) for length in contexts[::-1]}
    return PassCost(MEASURED_ROWS, contexts, [measured[length] for length in contexts])


def _pass_milliseconds(verifier: Verifier, prompt: Sequence[int]) -> list[float]:
    verifier.prefill(torch.tensor(prompt, dtype=torch.int64))
    drafts = [Draft.chain([prompt[-1]] * (rows - 1)) for rows in MEASURED_ROWS]
    laps: list[list[float]] = [[] for _ in drafts]
    end = time.perf_counter() + SECONDS
    # The first round may still compile and allocate, so that a second one is always needed.
    while len(laps[0]) < 2 or (len(laps[0]) < REPEATS + 1 and time.perf_counter() < end):
        # The numbers of rows are interleaved, so that a disturbance does not affect only one of them.
        for index, draft in enumerate(drafts):
            laps[index].append(pass_milliseconds(verifier, prompt[-1], draft))
    medians = [statistics.median(times[1:]) for times in laps]
    # More rows are never less work. Where a larger pass measured faster, that was noise.
    found: list[float] = np.maximum.accumulate(medians).tolist()
    return found
