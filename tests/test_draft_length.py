"""The draft length that `auto` chooses, against exhaustive arithmetic and simulated acceptance."""

from __future__ import annotations

import random

import pytest
import torch

from quasar.draft import Context, Draft, StepResult
from quasar.draft_length import LONGEST, AdaptiveLength, PassCost, RunningAcceptance, measure_pass_cost
from quasar.sampling import Sampling
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

FLAT = PassCost([1, 2, 32], [10.0, 10.0, 10.0])
LINEAR = PassCost([1, 32], [10.0, 320.0])


class Coin:
    """Offers chains of up to ``depth`` tokens."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.asked: list[int] = []

    def begin(self, prompt, verifier) -> None:
        pass

    def propose(self, context: Context, budget: int) -> Draft:
        self.asked.append(budget)
        return Draft.chain([1] * min(budget, self.depth))

    def observe(self, step: StepResult) -> None:
        pass


def simulate(auto: AdaptiveLength, rate: float, steps: int, seed: int = 0) -> list[int]:
    """Every drafted token is right with probability ``rate``; the lengths that were chosen."""
    generator = random.Random(seed)
    auto.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
    for _ in range(steps):
        draft = auto.propose(Context([1, 1], 1, Sampling(), torch.Generator()), 20)
        accepted = 0
        while accepted < len(draft) and generator.random() < rate:
            accepted += 1
        emitted = [1] * (accepted + 1)
        auto.observe(StepResult(draft, emitted, list(range(accepted)), torch.zeros(1, 1), None))
    return [int(length) for length in auto.notes()["chosen_length"]]


def best_fixed(cost: PassCost, rate: float) -> int:
    def speed(length: int) -> float:
        return sum(rate**position for position in range(length + 1)) / cost(1 + length)

    return max(range(21), key=speed)


def test_pass_cost_interpolates_and_extrapolates() -> None:
    cost = PassCost([1, 2, 4], [10.0, 12.0, 20.0])
    assert [cost(rows) for rows in (1, 1.5, 2, 3, 4, 6)] == [10.0, 11.0, 12.0, 16.0, 20.0, 28.0]


def test_running_acceptance_by_position() -> None:
    running = RunningAcceptance()
    assert running.reach()[0] == pytest.approx(0.7)
    assert running.reach()[2] == pytest.approx(0.7**3)
    for _ in range(2000):
        running.add(2, 2)
        running.add(4, 2)
    reach = running.reach()
    # Always right up to position 2, never at position 3: the shrinkage leaves what three steps' evidence is worth.
    assert reach[1] > 0.95
    assert reach[2] < 0.25
    assert len(reach) == LONGEST


def test_a_free_pass_takes_the_longest_draft_and_a_dear_one_none() -> None:
    assert simulate(AdaptiveLength(Coin(12), FLAT), 0.9, 300)[-1] >= 12
    lengths = simulate(AdaptiveLength(Coin(12), LINEAR), 0.9, 300)
    assert sum(lengths[50:]) / len(lengths[50:]) < 0.2


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.85])
def test_chosen_lengths_are_near_the_best_fixed_one(rate: float) -> None:
    """Rows cost 15 % of a pass each: judged by the expected rate of what was chosen, within 5 % of the best length."""
    cost = PassCost([1, 32], [10.0, 10.0 + 31 * 1.5])
    lengths = simulate(AdaptiveLength(Coin(20), cost), rate, 600)[100:]
    emitted = sum(sum(rate**position for position in range(length + 1)) for length in lengths)
    speed = emitted / sum(cost(1 + length) for length in lengths)
    best = best_fixed(cost, rate)
    assert speed > 0.95 * sum(rate**position for position in range(best + 1)) / cost(1 + best)


def test_expected_gain_is_the_expected_rate_over_no_draft() -> None:
    auto = AdaptiveLength(Coin(4), FLAT)
    length, gain = auto.choose(2)
    assert (length, gain) == (2, pytest.approx(1 + 0.7 + 0.49))
    assert auto.choose(0) == (0, 1.0)


def test_acceptance_that_improves_is_noticed() -> None:
    auto = AdaptiveLength(Coin(8), PassCost([1, 32], [10.0, 10.0 + 31 * 5.0]))
    assert simulate(auto, 0.05, 300)[-1] == 0
    assert max(simulate(auto, 0.95, 400)[-20:]) >= 4


def test_measured_cost_of_the_tiny_model(tiny) -> None:
    verifier = FP16Verifier(tiny, Setup(64))
    cost = measure_pass_cost(verifier, [1, 2, 3])
    assert verifier.cache.length == 3
    assert len(cost.milliseconds) == len(cost.rows)
    assert min(cost.milliseconds) > 0


def test_in_a_copied_passage_drafts_are_longer_than_outside() -> None:
    """Passages of twenty steps whose drafts are right, and as many whose drafts are wrong, in turn."""
    auto = AdaptiveLength(Coin(12), PassCost([1, 32], [10.0, 10.0 + 31 * 1.5]))
    auto.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
    chosen: dict[bool, list[int]] = {True: [], False: []}
    for step in range(400):
        copied = step // 20 % 2 == 0
        draft = auto.propose(Context([1, 1], 1, Sampling(), torch.Generator()), 20)
        # What comes before the first step of a passage with a draft cannot tell of it.
        if step % 20 >= 5 and step >= 200:
            chosen[copied].append(len(draft))
        accepted = len(draft) if copied else 0
        auto.observe(StepResult(draft, [1] * (accepted + 1), list(range(accepted)), torch.zeros(1, 1), None))
    assert min(chosen[True]) == 12
    assert sum(chosen[False]) / len(chosen[False]) < 2
