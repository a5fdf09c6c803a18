"""How many tokens of a draft tree are worth a row of the pass: running acceptance rates and the measured pass times."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from quasar.decoding.draft import ROOT
from quasar.drafters._pass_cost import PassCost
from quasar.drafters._probing import ProbeCredit

DECAY = 0.98
"""Factor on the weight of older tries of the same kind of token: about the last fifty tries count."""


class NodeRates:
    """Running acceptance rates of draft tokens by kind, among the tokens whose parent was accepted.

    A kind is anything that tells tokens apart before they are verified, such as (source, depth).

    weight: weight of a kind's first estimate in tries. It fades like older tries
    """

    def __init__(self, weight: float = 2.0) -> None:
        self._weight = weight
        self._counts: dict[Hashable, tuple[float, float]] = {}

    def rate(self, kind: Hashable, first: float) -> float:
        """Return the acceptance rate of a kind, ``first`` if no token of this kind was tried yet."""
        tried, kept = self._counts.get(kind, (1.0, first))
        return kept / tried

    def add(self, kind: Hashable, accepted: bool, first: float) -> None:
        """Count one token of a kind whose parent was accepted. first: the estimate before any was tried."""
        tried, kept = self._counts.get(kind, (self._weight, self._weight * first))
        self._counts[kind] = tried * DECAY + 1, kept * DECAY + accepted


class TreeSize:
    """Chooses how many of a tree's tokens are verified, the most probable first.

    With p_i the probability that the token with the i-th highest probability is accepted, t the measured time of a pass
    and s the number of scratch rows, the number n maximizes the expected tokens per second

        (1 + p_1 + … + p_n) / t(1 + s + n)

    Where t grows by c per row, this cuts the tree where p_n falls below c / t times the expected tokens of the step.

    Example: t(M) = 10 + (M - 1) ms and p = (0.5, 0.25, 0.05). The rates for n = 0 to 3 are 1 / 10, 1.5 / 11, 1.75 / 12
    and 1.8 / 13 tokens per ms, so two tokens are verified.

    From time to time one token more is verified, because the estimates of tokens that are never tried cannot rise. Such
    probes cost at most 1 % of the time (`ProbeCredit`).
    """

    def __init__(self, cost: PassCost) -> None:
        self._cost, self._credit = cost, ProbeCredit()

    def choose(self, probabilities: Sequence[float], context: int, scratch_rows: int = 0) -> int:
        """Return the number of tokens to verify after ``context`` tokens, given descending probabilities."""
        milliseconds = self._cost(1 + scratch_rows + np.arange(len(probabilities) + 1), context)
        size = int((np.cumsum([1.0, *probabilities]) / milliseconds).argmax())
        if size == len(probabilities):
            return size
        extra = float(milliseconds[size + 1] - milliseconds[size])
        self._credit.earn(float(milliseconds[size]), extra)
        if not self._credit.affords(extra):
            return size
        self._credit.spend(extra)
        return size + 1


def by_probability(parents: Sequence[int], rates: Sequence[float]) -> list[tuple[float, int]]:
    """Return (probability, node) of a tree's tokens, the most probable first and every parent before its children.

    rates: probability that each token is accepted if its parent is; parents come before their children
    """
    reached: list[float] = []
    for parent, rate in zip(parents, rates, strict=True):
        reached.append(rate if parent == ROOT else rate * reached[parent])
    # A child is never more probable than its parent, and sorting is stable.
    return sorted(zip(reached, range(len(reached)), strict=True), key=lambda entry: -entry[0])


def subtree(tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return tokens and parents of the tree of ``nodes``, in ascending order. It must contain their parents."""
    kept = sorted(nodes)
    place = {node: index for index, node in enumerate(kept)}
    place[ROOT] = ROOT
    return [tokens[node] for node in kept], [place[parents[node]] for node in kept]
