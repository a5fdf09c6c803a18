"""The block that a cascade chooses: compared with the arithmetic of its costs and with simulated agreement."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from quasar.drafters._block_choice import (
    LEAST_EVIDENCE,
    BlockChoice,
    Start,
    Times,
    block_rates,
    expected_tokens,
    unknown_agreement,
)
from quasar.drafters._pass_cost import PassCost

FREE = PassCost([1, 2], [100], [[1.0, 1.0]])
"""An inner pass whose rows cost nothing: unread tokens are free."""
LONGEST = 32


def linear(base: float, slope: float) -> PassCost:
    """Return passes of ``base`` ms and ``slope`` ms more per row."""
    return PassCost([1, 32], [100], [[base + slope, base + 32 * slope]])


def test_expected_tokens_are_those_of_every_outcome() -> None:
    for agreement, size in ((0.5, 1), (0.9, 3), (0.96, 8)):
        outcomes = [agreement**kept * (1 - agreement) for kept in range(size)] + [agreement**size]
        assert sum(outcomes) == pytest.approx(1.0)
        tokens = sum(probability * (kept + 1) for kept, probability in enumerate(outcomes))
        assert expected_tokens(agreement, np.array([size]))[0] == pytest.approx(tokens)
    assert expected_tokens(1.0, np.array([1, 5])).tolist() == [2.0, 6.0]


def test_rates_of_int8_and_ngram_below_a_bf16_pass() -> None:
    """Costs of a small model: n-gram drafts under a bf16 pass take 4.95 ms per token, and under an int8 pass 3.2 ms.

    With a bf16 pass of 9.3 ms and an agreement from 95.5 % to 96.5 %, blocks of 8 to 10 tokens are 1.07 to 1.11 times
    as fast as the former.
    """
    outer_ms = np.full(LONGEST, 9.3)
    for agreement, gain in ((0.955, 1.07), (0.965, 1.11)):
        gains = block_rates(agreement, 3.2, outer_ms) * 4.95
        assert gains[7] == pytest.approx(gain, abs=0.003)
        assert gains[7:10] == pytest.approx([gain] * 3, abs=0.013)
        assert gains.max() < gain + 0.005


def test_rates_are_tokens_over_the_time_of_every_level() -> None:
    found = block_rates(0.8, 2.0, np.array([10.0, 11.0]), ahead_ms=1.0)
    assert found.tolist() == pytest.approx([1.8 / 13.0, 2.44 / 16.0])


class Machine:
    """Steps whose times are given and whose agreement is drawn.

    direct: the tokens that a direct step emits, one of them at random; its pass has 6 rows
    tokens, ms: the expected tokens and the times of all steps
    """

    def __init__(self, agreement: float, inner_ms: float, outer: PassCost, direct: list[int], seed: int = 0) -> None:
        self.agreement, self.inner_ms, self.outer, self.direct = agreement, inner_ms, outer, direct
        self.random = random.Random(seed)
        self.recent = unknown_agreement()
        self.choice = BlockChoice(outer, FREE, self.recent)
        self.tokens, self.ms = 0.0, 0.0

    def pass_ms(self, rows: int) -> float:
        return float(self.outer(np.array([rows]), 100)[0])

    def step(self, hit: bool = False) -> int:
        """Take the step that the choice wants and return the size of its block."""
        start = Start(100, 1, hit)
        size = self.choice.choose(LONGEST, start)
        if size:
            accepted = 0
            while accepted < size and self.random.random() < self.agreement:
                accepted += 1
            times = Times(size + 1, size * self.inner_ms, self.pass_ms(size + 1))
            self.recent.add(accepted, accepted + (accepted < size))
            self.choice.add_block(start, times)
            self.tokens += sum(self.agreement**kept for kept in range(size + 1))
        else:
            times = Times(6, 0.05, self.pass_ms(6))
            self.recent.forget(LEAST_EVIDENCE)
            self.choice.add_direct(start, times, self.random.choice(self.direct))
            self.tokens += sum(self.direct) / len(self.direct)
        self.ms += times.draft_ms + times.pass_ms
        return size

    def best_single_level(self) -> tuple[int, float]:
        """Return the best fixed size of a block, or 0 for direct steps, and its tokens per millisecond."""
        mean = sum(self.direct) / len(self.direct)
        rates = {0: mean / (self.pass_ms(6) + 0.05)}
        for size in range(1, LONGEST + 1):
            tokens = 1 + sum(self.agreement**kept for kept in range(1, size + 1))
            rates[size] = tokens / (size * self.inner_ms + self.pass_ms(size + 1))
        best = max(rates, key=rates.__getitem__)
        return best, rates[best]


COSTS = [(1.5, linear(8.0, 0.15)), (3.2, linear(8.0, 0.15)), (3.2, linear(6.0, 0.6)), (5.0, linear(12.0, 0.3))]
EMITTED = [[1], [1, 1, 2, 2], [1, 1, 1, 2, 4]]


@pytest.mark.parametrize("agreement", [0.5, 0.7, 0.85, 0.92, 0.95, 0.97, 0.99])
def test_the_choice_is_near_the_best_single_level(agreement: float) -> None:
    """Within 3 % of the best fixed block and of direct steps, whichever is better, at every cost."""
    for (inner_ms, outer), direct in product(COSTS, EMITTED):
        machine = Machine(agreement, inner_ms, outer, direct)
        for _ in range(1000):
            machine.step()
        best, rate = machine.best_single_level()
        assert machine.tokens / machine.ms > 0.97 * rate, (inner_ms, direct, best)


def test_the_grid_has_both_best_levels() -> None:
    best = [
        Machine(agreement, inner_ms, outer, direct).best_single_level()[0]
        for agreement, (inner_ms, outer), direct in product((0.5, 0.85, 0.97), COSTS, EMITTED)
    ]
    assert {0, 1, 3, 6, 14} <= set(best)


def test_what_got_better_is_found_again() -> None:
    """Agreement falls to 30 % and direct steps take over; when it is back, blocks are."""
    machine = Machine(0.97, 2.0, linear(8.0, 0.1), [1])
    sizes = [machine.step() for _ in range(200)]
    assert sum(size > 0 for size in sizes[100:]) >= 95
    machine.agreement = 0.3
    sizes = [machine.step() for _ in range(400)]
    assert sum(size > 2 for size in sizes[200:]) < 10
    machine.agreement = 0.97
    sizes = [machine.step() for _ in range(600)]
    assert sum(size > 0 for size in sizes[300:]) >= 290
