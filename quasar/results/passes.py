"""What timed verification passes say: their cost, where they stop being bound by memory, and what speedup follows.

t(M) is the time of a pass with M rows behind a context, and t_ref(1) that of the reference's pass with one row behind
the same context. Every ratio is taken within one repetition, in which the two times are seconds apart; its estimate is
the median over repetitions, with a percentile bootstrap over repetitions as its 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from quasar.errors import RequestError
from quasar.results.estimates import Group, groups
from quasar.results.intervals import RESAMPLES, Estimate, settled
from quasar.results.quantities import QUANTITIES

BEND = 1.25
"""A pass counts as no longer bound by memory from this multiple of the time of a pass with one row on."""


@dataclass(frozen=True, eq=False)
class PassTimes:
    """The passes of one arm behind one context, in R repetitions.

    rows: the measured numbers of rows, ascending, [M]; the first one is 1
    pass_ms, reference_ms: [M, R]
    copy_bandwidth: bytes per second, [M, R]
    bytes_read: weights, keys and values that a pass reads
    """

    arm: str
    verifier: str
    context: int
    rows: np.ndarray
    pass_ms: np.ndarray
    reference_ms: np.ndarray
    copy_bandwidth: np.ndarray
    bytes_read: int
    weight_bytes: int

    def milliseconds(self, rows: float) -> Estimate:
        """Return t(M); between measured numbers of rows it is interpolated, as in all functions that follow.

        Raises ValueError if ``rows`` is beyond the measured numbers.
        """
        return self._at(rows, self.pass_ms)

    def relative_time(self, rows: float) -> Estimate:
        """Return t(M) / t(1), the time of a pass in units of the same verifier's pass with one row."""
        return self._at(rows, self._relative)

    def cost(self, rows: float) -> Estimate:
        """Return t(M) / t_ref(1), the time of a pass in units of a step of AR-ref."""
        return self._at(rows, self._cost)

    def break_even(self, draft_lengths: Mapping[int, float]) -> Estimate:
        """Return the τ above which steps are faster than AR-ref; drafting itself is not counted.

        draft_lengths: share of the steps by their number of draft tokens

        A step emits τ tokens in t(γ + 1), AR-ref one token in t_ref(1), so that τ has to be the mean over the steps of
        t(γ + 1) / t_ref(1). This is not the cost of the mean length, because t is no straight line.
        """
        return self._mean({1 + length: share for length, share in draft_lengths.items()}, self._cost)

    def rows_of_cost(self, cost: float) -> float:
        """Return the number of rows M at which t(M) / t_ref(1) reaches ``cost``; the last measured one if none does."""
        medians = np.maximum.accumulate(np.median(self._cost, axis=1))
        return float(np.interp(cost, medians, self.rows))

    def bandwidth_share(self, rows: float) -> Estimate:
        """Return the bytes that the pass reads per second over the copy bandwidth.

        It may exceed 1: a copy writes as much as it reads, and a pass only reads.
        """
        return self._at(rows, self.bytes_read / (self.pass_ms / 1e3) / self.copy_bandwidth)

    def floor(self) -> Estimate:
        """Return the time that reading all bytes takes at the copy bandwidth, in units of t(1)."""
        return self.bandwidth_share(1)

    def bend(self) -> Estimate:
        """Return the number of rows M at which t(M) first reaches `BEND` times t(1); infinite if it never does."""
        return _estimate(self._relative, lambda medians: _crossing(self.rows, medians))

    @property
    def _cost(self) -> np.ndarray:
        cost: np.ndarray = self.pass_ms / self.reference_ms
        return cost

    @property
    def _relative(self) -> np.ndarray:
        ratio: np.ndarray = self.pass_ms / self.pass_ms[:1]
        return ratio

    def _at(self, rows: float, values: np.ndarray) -> Estimate:
        return self._mean({rows: 1.0}, values)

    def _mean(self, shares: Mapping[float, float], values: np.ndarray) -> Estimate:
        """Return the mean of the values at several numbers of rows, each with its share of the passes."""
        for rows in shares:
            if not self.rows[0] <= rows <= self.rows[-1]:
                raise ValueError(f"{rows:g} rows are beyond the measured {self.rows[0]} to {self.rows[-1]}")
        # The weights of the measured numbers of rows in a linear interpolation.
        units = np.eye(len(self.rows))
        weights = np.array([np.interp(list(shares), self.rows, unit) @ list(shares.values()) for unit in units])
        used = weights != 0
        return _estimate(values[used], lambda medians: weights[used] @ medians)


def pass_times(passes: pd.DataFrame) -> list[PassTimes]:
    """Return the times of every arm and context, in order of appearance.

    passes: the table of `quasar.results.pass_rows`

    Repetitions that lack a number of rows are left out. Raises RequestError if none is complete.
    """
    found = []
    for _, table in passes.groupby(["arm", "context"], sort=False):
        first = table.iloc[0]
        arm, context = str(first["arm"]), int(first["context"])
        wide = {
            name: table.pivot(index="rows", columns="repetition", values=name).dropna(axis=1)
            for name in ("pass_ms", "reference_ms", "copy_bandwidth")
        }
        if wide["pass_ms"].empty or wide["pass_ms"].index[0] != 1:
            raise RequestError(f"{arm}, context {context}: no repetition has timed every number of rows, with 1 first")
        found.append(
            PassTimes(
                arm=arm,
                verifier=str(first["verifier"]),
                context=context,
                rows=wide["pass_ms"].index.to_numpy(),
                bytes_read=int(first["weight_bytes"] + first["kv_bytes"]),
                weight_bytes=int(first["weight_bytes"]),
                **{name: frame.to_numpy(dtype=float) for name, frame in wide.items()},
            )
        )
    return found


def nearest(times: Sequence[PassTimes], arm: str, context: float) -> PassTimes | None:
    """Return an arm's times behind the measured context that is nearest; None if its passes were not timed."""
    own = [found for found in times if found.arm == arm]
    return min(own, key=lambda found: abs(math.log(found.context / context)), default=None)


@dataclass(frozen=True)
class Speculation:
    """What the passes of an arm predict for its decoding along the reference's text, and what was measured.

    draft_tokens: mean number of draft tokens per step
    context: the context of the passes, the measured one that is nearest to the mean context of the steps
    tau_ref: tokens per step
    needed: the τ above which steps are faster than AR-ref, the mean over the steps of t(γ + 1) / t_ref(1)
    rows: number of rows of a pass that costs as much
    predicted: speedup over AR-ref if a step were nothing but its pass, τ_ref / needed
    measured: speedup over AR-ref on the same text
    residual: measured over predicted; below 1 because of what a step does besides its pass
    """

    group: Group
    draft_tokens: float
    context: int
    tau_ref: Estimate
    needed: Estimate
    rows: float
    predicted: Estimate
    measured: Estimate
    residual: Estimate


def speculations(times: Sequence[PassTimes], rows: pd.DataFrame) -> list[Speculation]:
    """Return the predicted and the measured speedup of every group of rows whose passes were timed.

    rows: the table of `quasar.results.rows`

    The draft lengths are those of free-running decoding. Groups are left out if they were not decoded along the
    reference's text, or if a draft is longer than the measured passes.
    """
    found = []
    for group in groups(rows):
        table = group.rows
        steps = float(table["steps"].sum())
        if not steps:
            continue
        own = nearest(times, group.arm, max(1.0, float(table["context"].sum()) / steps))
        lengths = draft_lengths(table)
        tau_ref, measured, step = (quantity.of(table, rows) for quantity in (_TAU_REF, _MEASURED, _STEP_COST))
        if own is None or own.rows[-1] < max(lengths) + 1 or tau_ref is None or measured is None or step is None:
            continue
        needed = own.break_even(lengths)
        found.append(
            Speculation(
                group=group,
                draft_tokens=sum(length * share for length, share in lengths.items()),
                context=own.context,
                tau_ref=tau_ref,
                needed=needed,
                rows=own.rows_of_cost(needed.value),
                predicted=quotient(tau_ref, needed),
                measured=measured,
                residual=quotient(needed, step),
            )
        )
    return found


def draft_lengths(rows: pd.DataFrame) -> dict[int, float]:
    """Return the share of the steps by their number of draft tokens, over rows of `quasar.results.rows`.

    For example of 10 steps, of which 6 drafted at least one token and 2 at least two: ``{0: 0.4, 1: 0.4, 2: 0.2}``.
    """
    longest = max((len(counts) for counts in rows["drafted_by_length"]), default=0)
    at_least = np.zeros(longest + 2)
    at_least[0] = rows["steps"].sum()
    for counts in rows["drafted_by_length"]:
        at_least[1 : 1 + len(counts)] += counts
    steps = at_least[:-1] - at_least[1:]
    return {length: count / at_least[0] for length, count in enumerate(steps.tolist()) if count}


def quotient(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Return the quotient of two estimates that are independent of each other.

    The distances of the bounds are added in quadrature on a logarithmic scale (MOVER: Donner and Zou, *Closed-form
    confidence intervals for functions of the normal mean and standard deviation*, 2012). A value without an interval
    counts as exact.
    """
    value = numerator.value / denominator.value
    if not math.isfinite(value) or value <= 0:
        return Estimate(value)
    below = math.hypot(_distance(numerator, numerator.low), _distance(denominator, denominator.high))
    above = math.hypot(_distance(numerator, numerator.high), _distance(denominator, denominator.low))
    if below == above == 0:
        return Estimate(value)
    return Estimate(value, value * math.exp(-below), value * math.exp(above))


_TAU_REF, _MEASURED, _STEP_COST = (
    QUANTITIES[name]
    for name in ("mean_acceptance_length_ref", "reference_text_speedup", "break_even_acceptance_length")
)


def _estimate(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Estimate a statistic of the medians over repetitions.

    values: [M, R]
    statistic: returns [B] for medians [M, B]
    """
    repetitions = values.shape[1]
    value = settled(statistic(np.median(values, axis=1, keepdims=True))[0])
    if repetitions < 2:
        return Estimate(value)
    resampled = statistic(np.median(values[:, _draws(repetitions)], axis=2))
    # Bounds between two resamples would be made up where one of them is infinite.
    low, high = np.quantile(resampled, [0.025, 0.975], method="closest_observation")
    return Estimate(value, settled(low), settled(high)) if low < high else Estimate(value)


@lru_cache(maxsize=8)
def _draws(repetitions: int) -> np.ndarray:
    """Return the repetitions of every resample, [RESAMPLES, R].

    A resample draws whole repetitions, so that what they share, such as a slow minute, stays together.
    """
    return np.random.default_rng(0).integers(repetitions, size=(RESAMPLES, repetitions))


def _crossing(rows: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """Return where curves [M, B] over ``rows`` [M] first reach `BEND`, [B]; infinite where they do not.

    For example the curve 1, 1.1, 1.4 over 1, 2 and 4 rows reaches 1.25 at 3 rows.
    """
    reached = relative >= BEND
    after = np.maximum(reached.argmax(axis=0), 1)
    index = np.arange(relative.shape[1])
    low, high = relative[after - 1, index], relative[after, index]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing: np.ndarray = rows[after - 1] + (BEND - low) / (high - low) * (rows[after] - rows[after - 1])
    return np.where(reached.any(axis=0), crossing, np.inf)


def _distance(estimate: Estimate, bound: float | None) -> float:
    return 0.0 if bound is None else abs(math.log(bound / estimate.value))
