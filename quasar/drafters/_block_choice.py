"""``drafter.block=auto``: chooses the block of each step of a cascade from measured costs and recent agreement."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

import numpy as np

from quasar.drafters._pass_cost import PassCost

FIRST_BLOCK = 8
"""Tokens of a block before any was measured."""
FIRST_AGREEMENT = 0.95
"""Agreement per token before any was measured, which counts like `FIRST_EVIDENCE` tokens."""
FIRST_EVIDENCE = 4.0
LEAST_EVIDENCE = 16.0
"""What was measured before long counts at least like this many tokens."""
FIRST_DIRECT = 2.0
"""Tokens of a direct step before any was measured, which count like `FIRST_STEPS` steps.

The guess is optimistic, because direct steps soon correct an estimate that is too high. One that is too low would lead
to no direct steps.
"""
FIRST_STEPS = 20.0
DECAY = 0.99
"""Factor on the weight of older steps for every new one of the same kind. About the last hundred steps count."""
MEASURED_TIMES = 9
"""The time of inner tokens and of drafts is the median of this many steps, because a disturbance is no trend."""
PROBE_SHARE = 0.005
"""Share of the time that may be spent on steps of the kind that is believed to be slower.

Without them, an estimate that is too low would never be corrected. A step of the slower kind takes a few milliseconds
more than the other kind would for the same tokens, and the share decides how often it is affordable. So it is rare if
the difference is large, and frequent if it is small and may have changed its sign.
"""


def expected_tokens(agreement: float, sizes: np.ndarray) -> np.ndarray:
    """Return the expected tokens of a step by the number of tokens in its block: the accepted ones and the bonus token.

    If each token is accepted with probability p after those before it, these are 1 + p + … + p^B.
    """
    if agreement >= 1.0:
        return sizes + 1.0
    found: np.ndarray = (1.0 - agreement ** (sizes + 1.0)) / (1.0 - agreement)
    return found


def block_rates(agreement: float, inner_ms: float, outer_ms: np.ndarray, ahead_ms: float = 0.0) -> np.ndarray:
    """Return the expected tokens per millisecond of a step with a block of 1, 2, … tokens.

        (1 + p + … + p^B) / (B t_inner + t_outer(B + 1) + t_ahead)

    This is the cost model of hierarchical speculative decoding (arXiv 2510.19705), in which the time per token is the
    sum of every level's time per pass over its tokens per pass, with the inner levels as one.

    agreement: probability p that the outer verifier accepts a token of the block
    inner_ms: t_inner, the inner level's time per token of a block
    outer_ms: t_outer, the time of the outer verifier's pass with 2, 3, … rows
    ahead_ms: t_ahead, the time that the inner level needs before its first token

    Example: with p = 0.96, t_inner = 3.2 ms and an outer pass of 9.3 ms for 9 rows, a block of 8 tokens gives 7.69
    tokens in 34.9 ms, so a token takes 4.54 ms.
    """
    sizes = np.arange(1, len(outer_ms) + 1)
    rates: np.ndarray = expected_tokens(agreement, sizes) / (sizes * inner_ms + outer_ms + ahead_ms)
    return rates


@dataclass(frozen=True)
class Start:
    """What is known when a step begins.

    context: cached tokens of the outer verifier
    unread: tokens that the inner verifier has not read, at least 1
    hit: whether the last draft of the inner drafter had tokens and was accepted completely
    """

    context: int
    unread: int
    hit: bool


@dataclass(frozen=True)
class Times:
    """rows: of the outer pass; draft_ms, pass_ms: time of drafting and of the rest of the step."""

    rows: int
    draft_ms: float
    pass_ms: float


class RecentMean:
    """A mean in which every new entry lowers the weight of the older ones."""

    def __init__(self, mean: float = 0.0, weight: float = 0.0) -> None:
        self._total, self.weight = mean * weight, weight

    @property
    def value(self) -> float:
        return self._total / self.weight

    def add(self, total: float, count: float = 1.0) -> None:
        """Add ``count`` entries with this sum."""
        self._total = DECAY * self._total + total
        self.weight = DECAY * self.weight + count

    def forget(self, least: float) -> None:
        """Lower the weight of all entries, but not below ``least``."""
        if self.weight * DECAY >= least:
            self.add(0.0, 0.0)


def unknown_agreement() -> RecentMean:
    """Return the agreement per token before any block: an optimistic guess that the first blocks replace."""
    return RecentMean(FIRST_AGREEMENT, FIRST_EVIDENCE)


class BlockChoice:
    """Chooses the number B of tokens that the inner level decodes before the outer verifier checks them.

    B = 0 means a direct step: the outer verifier checks the draft of the inner drafter itself, without the inner
    verifier. It emits n tokens on average in the time of a draft and of an outer pass. The choice is the block with the
    highest rate of `block_rates`, or a direct step if its rate is higher. The costs of passes were measured before the
    first prompt; they are multiplied by the slowdown of recent steps. Agreement, times and n are those of recent steps.

    Drafts are bursty: in a copied passage the inner drafter is right and a direct step emits many tokens, and elsewhere
    it offers nothing. So the times and n are kept separately for steps after a draft of the inner drafter that was
    accepted completely, and for all others.

    outer, inner: costs of the passes of the two verifiers
    agreement: the agreement per token of recent blocks
    """

    def __init__(self, outer: PassCost, inner: PassCost, agreement: RecentMean) -> None:
        self._outer, self._inner, self._agreement = outer, inner, agreement
        self._kinds = {True: _Kind(), False: _Kind()}
        self._slowdown = RecentMean(1.0, 1.0)

    def choose(self, longest: int, start: Start) -> int:
        """Return the number of tokens of the next block, from 0 to ``longest``."""
        kind = self._kinds[start.hit]
        if longest == 0 or (kind.inner_ms and not kind.draft_ms):
            return 0
        if not kind.inner_ms:
            return min(FIRST_BLOCK, longest)
        direct, blocks = self.rates(longest, start)
        size = int(blocks.argmax()) + 1
        block = float(blocks[size - 1])
        better, slower = (size, 0) if block > direct else (0, size)
        expected = float(expected_tokens(self._agreement.value, np.array([size]))[0])
        tokens = kind.emitted.value if slower == 0 else expected
        excess_ms = tokens / min(block, direct) - tokens / max(block, direct)
        if excess_ms > kind.credit_ms:
            return better
        kind.credit_ms -= excess_ms
        return slower

    def rates(self, longest: int, start: Start) -> tuple[float, np.ndarray]:
        """Return the expected tokens per millisecond of a direct step and of blocks of 1 to ``longest`` tokens.

        Both kinds of step must have been counted for ``start.hit``.
        """
        kind = self._kinds[start.hit]
        pass_ms = self._outer_ms(np.array([kind.rows.value, *range(2, longest + 2)]), start.context)
        direct = kind.emitted.value / (statistics.median(kind.draft_ms) + float(pass_ms[0]))
        inner_ms, ahead_ms = statistics.median(kind.inner_ms), self._ahead_ms(start)
        return direct, block_rates(self._agreement.value, inner_ms, pass_ms[1:], ahead_ms)

    def add_direct(self, start: Start, times: Times, emitted: int) -> None:
        """Count a direct step and the tokens that it emitted."""
        self._add(start, times)
        kind = self._kinds[start.hit]
        kind.emitted.add(emitted)
        kind.rows.add(times.rows)
        kind.draft_ms.append(times.draft_ms)

    def add_block(self, start: Start, times: Times) -> None:
        """Count a step with a block, of all rows of the pass but one."""
        inner_ms = max(0.0, times.draft_ms - self._ahead_ms(start)) / (times.rows - 1)
        kind = self._kinds[start.hit]
        kind.inner_ms.append(inner_ms)
        kind.emitted.forget(FIRST_STEPS)
        self._add(start, times)

    def _add(self, start: Start, times: Times) -> None:
        self._slowdown.add(times.pass_ms, float(self._outer(np.array([times.rows]), start.context)[0]))
        self._kinds[start.hit].credit_ms += PROBE_SHARE * (times.draft_ms + times.pass_ms)

    def _outer_ms(self, rows: np.ndarray, context: int) -> np.ndarray:
        found: np.ndarray = self._slowdown.value * self._outer(rows, context)
        return found

    def _ahead_ms(self, start: Start) -> float:
        """Return the time that the rows of unread tokens add to the first inner pass."""
        with_them, alone = self._inner(np.array([float(start.unread), 1.0]), start.context)
        return self._slowdown.value * float(with_them - alone)


class _Kind:
    """Measurements of the steps that begin alike. credit_ms: what may be spent on steps that are believed slower."""

    def __init__(self) -> None:
        self.inner_ms: deque[float] = deque(maxlen=MEASURED_TIMES)
        self.draft_ms: deque[float] = deque(maxlen=MEASURED_TIMES)
        self.emitted, self.rows = RecentMean(FIRST_DIRECT, FIRST_STEPS), RecentMean()
        self.credit_ms = 0.0
