"""How many tokens of a draft tree are worth a row of the pass: running acceptance rates and the measured pass times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quasar.decoding.draft import MAX_ROWS, ROOT, StepResult
from quasar.drafters._pass_cost import PassCost
from quasar.drafters._probing import ProbeCredit

DECAY = 0.98
"""Factor on the weight of older tries of the same kind of token: about the last fifty tries count."""
MOST_RATE = 0.98
"""The highest estimate of `RelatedRates`, whose common factor may exceed 1."""


@dataclass(frozen=True)
class Kind:
    """What tells draft tokens apart before they are verified, such as their source and depth.

    key: equal for tokens of one kind
    first: the assumed acceptance rate before a token of this kind has been tried
    """

    key: tuple[str | int, ...]
    first: float


@dataclass(frozen=True)
class Candidates:
    """The tokens of a tree with a kind each: ``tokens[T]``, ``parents[T]`` as in a `Draft`, ``kinds[T]``."""

    tokens: Sequence[int]
    parents: Sequence[int]
    kinds: Sequence[Kind]


class TreePruning:
    """Reduces trees of candidates to the tokens that are worth their rows, and learns from what is accepted.

    Every kind of token has a running acceptance rate, counted where the parent was accepted (`NodeRates`). The
    probability of a token is the product of the rates from the root to it, and `TreeSize` decides how many of the most
    probable tokens are verified.

    cost: the measured time of a pass
    rates: estimates the acceptance rates; `NodeRates` by default
    """

    def __init__(self, cost: PassCost, rates: NodeRates | None = None) -> None:
        self._size, self._rates = TreeSize(cost), rates or NodeRates()
        self.kinds: list[Kind] = []
        """The kinds of the last draft's tokens."""

    def rate(self, kind: Kind) -> float:
        """Return the present acceptance rate of a kind."""
        return self._rates.rate(kind)

    def row_cost(self, context: int) -> float:
        """Return `TreeSize.row_cost`."""
        return self._size.row_cost(context)

    def prune(self, tree: Candidates, context: int, scratch_rows: int = 0) -> tuple[list[int], list[int]]:
        """Return tokens and parents of the part of a tree to verify after ``context`` cached tokens."""
        ranked = by_probability(tree.parents, [self._rates.rate(kind) for kind in tree.kinds])
        size = self._size.choose([probability for probability, _ in ranked], context, scratch_rows)
        nodes = sorted(node for _, node in ranked[:size])
        self.kinds = [tree.kinds[node] for node in nodes]
        return subtree(tree.tokens, tree.parents, nodes)

    def add(self, step: StepResult) -> None:
        """Count the accepted tokens of a step whose draft `prune` has returned."""
        path = set(step.path)
        end = step.path[-1] if step.path else ROOT
        for node, parent in enumerate(step.draft.parents):
            # Behind the end of the output nothing was tried.
            untried = step.cut and parent == end
            if (parent == ROOT or parent in path) and not untried:
                self._rates.add(self.kinds[node], node in path)


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

    def row_cost(self, context: int) -> float:
        """Return the time that a row adds to a pass, over that of a pass with one row, at the cheapest number of rows.

        The n-th most probable token is not worth its row if its probability is below c (1 + p_1 + … + p_n-1) /
        (1 + c (n - 1)) for this cost c.
        """
        milliseconds = self._cost(np.arange(1, MAX_ROWS + 1), context)
        added = (milliseconds[1:] - milliseconds[0]) / np.arange(1, MAX_ROWS)
        return float(added.min() / milliseconds[0])


class NodeRates:
    """Running acceptance rates of draft tokens by kind, among the tokens whose parent was accepted.

    weight: weight of a kind's assumed rate in tries. It fades like older tries
    """

    def __init__(self, weight: float = 2.0) -> None:
        self._weight = weight
        self._counts: dict[tuple[str | int, ...], tuple[float, float]] = {}

    def rate(self, kind: Kind) -> float:
        tried, kept = self._counts.get(kind.key, (1.0, kind.first))
        return kept / tried

    def add(self, kind: Kind, accepted: bool) -> None:
        """Count one token of a kind whose parent was accepted."""
        tried, kept = self._counts.get(kind.key, (self._weight, self._weight * kind.first))
        self._counts[kind.key] = tried * DECAY + 1, kept * DECAY + accepted


class RelatedRates(NodeRates):
    """Rates of many kinds whose assumed rates are wrong by a common factor, as on a text that is harder than others.

    The rate of a kind is (k + w g f) / (n + w), with its accepted tokens k of n tries, its assumed rate f, the weight w
    and the common factor g. The factor compares all accepted tokens K with the assumed rates F of all tries:
    (K + w) / (F + w). Older tries fade, w does not, so that a rare kind keeps to what is assumed and g.

    Example with w = 10: if 2 of 20 tries with f = 0.5 were accepted, g is (2 + 10) / (10 + 10) = 0.6.
    A kind that was never tried then has the rate 0.6 f.
    """

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self._kept, self._assumed = weight, weight

    def rate(self, kind: Kind) -> float:
        tried, kept = self._counts.get(kind.key, (0.0, 0.0))
        factor = self._kept / self._assumed
        return min(MOST_RATE, (kept + self._weight * factor * kind.first) / (tried + self._weight))

    def add(self, kind: Kind, accepted: bool) -> None:
        tried, kept = self._counts.get(kind.key, (0.0, 0.0))
        self._counts[kind.key] = tried * DECAY + 1, kept * DECAY + accepted
        fresh = (1 - DECAY) * self._weight
        self._kept = self._kept * DECAY + accepted + fresh
        self._assumed = self._assumed * DECAY + kind.first + fresh


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
