"""Estimates with 95 % intervals: a BCa bootstrap over prompts and repetitions.

The rows of an experiment are crossed: every prompt is decoded in every repetition. The prompts vary because they are a
sample of a task, and the repetitions vary because the machine's speed drifts. Both are therefore drawn with
replacement, independently of each other, and the prompts within their task family (Owen, *The pigeonhole bootstrap*,
2007). The interval is bias-corrected and accelerated (Efron, *Better bootstrap confidence intervals*, 1987), with the
acceleration from a jackknife over prompts.

Every statistic is a function of sums per family, for example the ratio of two totals:

>>> families = ["math", "math", "code"]
>>> columns = {"tokens": np.array([[9.0], [6.0], [5.0]]), "steps": np.array([[3.0], [3.0], [4.0]])}
>>> estimate(columns, families, ratio_of_totals("tokens", "steps")).value
2.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
Sums = Mapping[str, np.ndarray]
Statistic = Callable[[Sums], np.ndarray]
"""Computes a value [...] from sums by column, each of shape [..., F] for F families."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    low, high: None if there are fewer than two prompts, or if no resample differs
    by_repetition: the value in each repetition alone; its spread shows the machine's drift
    p_of_one: two-sided bootstrap p-value for the value being 1, at least one over the number of resamples
    """

    value: float
    low: float | None = None
    high: float | None = None
    by_repetition: tuple[float, ...] = ()
    p_of_one: float | None = None

    def text(self, form: Callable[[float], str]) -> str:
        """Return the value with its interval if it has one, such as ``1.28x (1.25x to 1.31x)``."""
        if self.low is None or self.high is None:
            return form(self.value)
        return f"{form(self.value)} ({form(self.low)} to {form(self.high)})"


def estimate(columns: Mapping[str, np.ndarray], families: Sequence[str], statistic: Statistic) -> Estimate:
    """Estimate a statistic of ``columns``.

    columns: arrays [Q, R] over prompts and repetitions, without missing values
    families: the task family of each prompt, [Q]
    """
    members = [np.flatnonzero(column) for column in _membership(families).T]
    prompts, repetitions = next(iter(columns.values())).shape

    def evaluate(prompt_weights: np.ndarray, repetition_weights: np.ndarray) -> np.ndarray:
        def sums(values: np.ndarray) -> np.ndarray:
            by_family = [prompt_weights[:, places] @ values[places] for places in members]
            return np.stack([(found * repetition_weights).sum(axis=1) for found in by_family], axis=1)

        return statistic({name: sums(values) for name, values in columns.items()})

    value = value_of(columns, families, statistic)
    alone = evaluate(np.ones((repetitions, prompts)), np.eye(repetitions))
    by_repetition = tuple(map(settled, alone)) if repetitions > 1 else ()
    if prompts < 2:
        return Estimate(settled(value), by_repetition=by_repetition)
    resampled = evaluate(*_draws(tuple(families), repetitions))
    resampled = resampled[np.isfinite(resampled)]
    without_one = evaluate(1 - np.eye(prompts), np.ones((prompts, repetitions)))
    bounds = _bca(value, resampled, without_one[np.isfinite(without_one)])
    return Estimate(settled(value), *bounds, by_repetition=by_repetition, p_of_one=_p_of_one(resampled))


def settled(value: float) -> float:
    """Return a value with 12 significant digits: the others depend on the order in which a processor adds.

    A figure's bytes would show them.
    """
    return float(f"{value:.12g}")


def value_of(columns: Mapping[str, np.ndarray], families: Sequence[str], statistic: Statistic) -> float:
    """Return the statistic alone, without an interval; arguments as for `estimate`."""
    member = _membership(families)
    return float(statistic({name: values.sum(axis=1) @ member for name, values in columns.items()}))


def divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: np.ndarray = np.where(denominator == 0, np.nan, numerator / denominator)
    return quotient


def ratio_of_totals(numerator: str, denominator: str) -> Statistic:
    """The micro average: the total of one column over that of another."""
    return lambda sums: divided(sums[numerator].sum(-1), sums[denominator].sum(-1))


def mean_over_families(numerator: str, denominator: str) -> Statistic:
    """The mean of the families' ratios of totals, as papers report it."""
    return lambda sums: divided(sums[numerator], sums[denominator]).mean(-1)


def geometric_mean(log_ratio: str, ones: str) -> Statistic:
    """The geometric mean of the prompts' ratios, from a column of their logarithms and a column of ones."""
    return lambda sums: np.exp(divided(sums[log_ratio].sum(-1), sums[ones].sum(-1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for testing all of them (Holm, 1979), in the same order.

    For example ``[0.01, 0.04, 0.03]`` gives ``[0.03, 0.06, 0.06]``.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _membership(families: Sequence[str]) -> np.ndarray:
    """Return which family each prompt belongs to, one-hot [Q, F]; the families are in alphabetical order."""
    names = sorted(set(families))
    return np.array([[family == name for name in names] for family in families], dtype=np.float64)


@lru_cache(maxsize=8)
def _draws(families: tuple[str, ...], repetitions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each prompt, [RESAMPLES, Q], and each repetition, [RESAMPLES, R], is drawn.

    Every family keeps its number of prompts, unless a family has only one: nothing could vary within it, so all
    prompts are drawn from one pool then. All estimates over the same prompts use the same draws.
    """
    generator = np.random.default_rng(0)
    member = _membership(families)
    strata = member.T if member.sum(axis=0).min() > 1 else np.ones((1, len(member)))
    draws = np.zeros((RESAMPLES, len(member)))
    for stratum in strata:
        places = np.flatnonzero(stratum)
        draws[:, places] = generator.multinomial(len(places), [1 / len(places)] * len(places), RESAMPLES)
    return draws, generator.multinomial(repetitions, [1 / repetitions] * repetitions, RESAMPLES)


def _bca(value: float, resampled: np.ndarray, without_one: np.ndarray) -> tuple[float | None, float | None]:
    from scipy.special import ndtr, ndtri

    if resampled.size == 0 or without_one.size == 0 or np.ptp(resampled) <= 1e-12 * max(1.0, abs(value)):
        return None, None
    below = np.mean(resampled < value) + np.mean(resampled == value) / 2
    bias = ndtri(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    distances = without_one.mean() - without_one
    spread = np.sum(distances**2) ** 1.5
    acceleration = np.sum(distances**3) / (6 * spread) if spread > 0 else 0.0
    ends = ndtri([0.025, 0.975])
    levels = ndtr(bias + (bias + ends) / (1 - acceleration * (bias + ends)))
    low, high = np.quantile(resampled, levels)
    return settled(low), settled(high)


def _p_of_one(resampled: np.ndarray) -> float | None:
    if not resampled.size:
        return None
    above = float(np.mean(resampled > 1))
    return max(2 * min(above, 1 - above), 1 / RESAMPLES)
