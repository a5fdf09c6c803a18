"""Compares the draft lengths that `auto` chooses with exhaustive arithmetic and simulated acceptance."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from quasar.decoding.draft import MAX_ROWS, Context, Draft, Scratch, StepResult
from quasar.decoding.sampling import Sampling
from quasar.drafters._adaptive_length import FIRST_RATE, LONGEST, AdaptiveLength, RunningAcceptance, StepCost
from quasar.drafters._pass_cost import PassCost, measure_pass_cost
from quasar.drafters.base import Drafter
from quasar.model.execution.cpu_tape import MAX_ROWS as TAPED_ROWS
from quasar.model.execution.cuda_graph import BUCKETS as GRAPH_ROWS
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

FLAT = PassCost([1, 2, 32], [10], [[10.0, 10.0, 10.0]])
LINEAR = PassCost([1, 32], [10], [[10.0, 320.0]])
SLOPING = PassCost([1, 32], [10], [[10.0, 10.0 + 31 * 1.5]])


class Coin(Drafter):
    """Offers chains of up to ``depth`` tokens."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.asked: list[int] = []

    def begin(self, prompt) -> None:
        pass

    def propose(self, context: Context, budget: int) -> Draft:
        self.asked.append(budget)
        return Draft.chain([1] * min(budget, self.depth))

    def observe(self, step: StepResult) -> None:
        pass


def timeless(drafter: Coin, cost: PassCost) -> AdaptiveLength:
    """Use a clock that stands still: drafts take no time, and passes take the time of ``cost``."""
    return AdaptiveLength(drafter, cost, clock=lambda: 0.0)


def simulate(auto: AdaptiveLength, rate: float, steps: int, seed: int = 0) -> list[int]:
    """Return the chosen lengths if every drafted token is right with probability ``rate``."""
    generator = random.Random(seed)
    auto.begin(torch.tensor([1]))
    for _ in range(steps):
        draft = auto.propose(Context([1, 1], 1, Sampling(), torch.Generator()), 20)
        accepted = 0
        while accepted < len(draft) and generator.random() < rate:
            accepted += 1
        emitted = [1] * (accepted + 1)
        auto.observe(StepResult(draft, emitted, list(range(accepted)), torch.zeros(1, 1), None))
    return [int(length) for length in auto.notes()["chosen_length"]]


def test_pass_cost_interpolates_and_extrapolates() -> None:
    cost = PassCost([1, 2, 4], [100], [[10.0, 12.0, 20.0]])
    rows = np.array([1, 1.5, 2, 3, 4, 6])
    for context in (1, 100, 5000):
        assert cost(rows, context).tolist() == [10.0, 11.0, 12.0, 16.0, 20.0, 28.0]


def test_pass_cost_grows_with_the_context() -> None:
    cost = PassCost([1, 2, 4], [100, 300], [[10.0, 12.0, 20.0], [14.0, 20.0, 40.0]])
    rows = np.array([1, 2, 4, 6])
    assert cost(rows, 100).tolist() == [10.0, 12.0, 20.0, 28.0]
    assert cost(rows, 150).tolist() == [11.0, 14.0, 25.0, 36.0]
    assert cost(rows, 500).tolist() == [18.0, 28.0, 60.0, 92.0]
    # Never below a pass of one row behind the shortest context that was measured.
    assert cost(rows, 0)[0] == 10.0


def test_step_cost_follows_the_machine_and_the_drafter() -> None:
    cost = StepCost(LINEAR)
    assert cost.milliseconds(3, 0).tolist() == [10.0, 20.0, 30.0, 40.0]
    # Passes take twice what was measured, and every drafted token 4 ms.
    for _ in range(5):
        cost.add(Draft.chain([1, 2]), 0, draft_ms=8.0, pass_ms=60.0)
        cost.add(Draft(), 0, draft_ms=0.1, pass_ms=20.0)
    assert cost.milliseconds(3, 0) == pytest.approx([20.0, 44.0, 68.0, 92.0])


def test_step_cost_takes_the_lower_median_of_the_latest_drafts() -> None:
    def drafting(*times: float) -> float:
        """Return the estimated milliseconds per position after drafts of two tokens with these times."""
        cost = StepCost(LINEAR)
        for ms in times:
            cost.add(Draft.chain([1, 2]), 0, draft_ms=ms, pass_ms=30.0)
        return float(cost.milliseconds(1, 0)[1] - 20.0)

    assert drafting(500.0) == 0.0
    assert drafting(500.0, 8.0) == pytest.approx(4.0)
    assert drafting(*[8.0] * 9, *[500.0] * 4) == pytest.approx(4.0)
    assert drafting(*[8.0] * 9, *[500.0] * 5) == pytest.approx(250.0)


def test_drafting_is_believed_free_after_long_without() -> None:
    cost = StepCost(LINEAR)
    for _ in range(9):
        cost.add(Draft.chain([1]), 0, draft_ms=500.0, pass_ms=20.0)
    for steps, expected in ((2499, 500.0), (1, 0.0)):
        for _ in range(steps):
            cost.add(Draft(), 0, draft_ms=0.1, pass_ms=10.0)
        assert cost.milliseconds(1, 0)[1] - 20.0 == pytest.approx(expected)


def test_step_cost_counts_the_rows_of_trees_and_of_scratch() -> None:
    cost = StepCost(LINEAR)
    scratch = Scratch(torch.tensor([1]), torch.tensor([1]), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]))
    cost.add(Draft([1, 2, 3, 4], [-1, -1, 0, 1], scratch=scratch), 0, draft_ms=0.0, pass_ms=60.0)
    # Two rows per depth and one of scratch; a pass without a draft needs neither.
    assert cost.milliseconds(2, 0) == pytest.approx([10.0, 40.0, 60.0])


def test_longer_contexts_make_drafts_shorter() -> None:
    cost = PassCost([1, 32], [100, 1000], [[10.0, 10.0 + 31 * 0.5], [20.0, 20.0 + 31 * 8.0]])
    auto = timeless(Coin(20), cost)
    simulate(auto, 0.8, 300)
    assert auto.choose(20, 100)[0] > auto.choose(20, 1000)[0] > auto.choose(20, 10_000)[0]


def test_running_acceptance_by_position() -> None:
    running = RunningAcceptance()
    assert running.reach()[0] == pytest.approx(FIRST_RATE)
    assert running.reach()[2] == pytest.approx(FIRST_RATE**3)
    assert running.reach(5) == running.reach()[:5]
    for _ in range(2000):
        running.add(2, 2)
        running.add(4, 2)
    reach = running.reach()
    # Always right up to position 2, never at position 3: the shrinkage leaves what two steps' evidence is worth.
    assert reach[1] > 0.95
    assert reach[2] < 0.1
    assert len(reach) == LONGEST


def test_the_first_position_has_the_rate_of_its_last_fifty_drafts() -> None:
    """An independent definition: the mean with weights 0.98^age, of which the assumed first drafts are the oldest."""
    running = RunningAcceptance()
    outcomes = [random.Random(1).random() < 0.3 for _ in range(120)]
    for accepted in outcomes:
        running.add(1, int(accepted))
    ages = np.arange(120)[::-1]
    weights = np.append(2.0 * 0.98**120, 0.98**ages)
    expected = np.average([0.75, *outcomes], weights=weights)
    assert running.reach(1)[0] == pytest.approx(float(expected))
    before = running.reach(1)[0]
    for _ in range(1000):
        running.rest()
    assert running.reach(1)[0] == pytest.approx(before)
    # After a rest the next draft counts like all the evidence before it.
    running.add(1, 1)
    assert running.reach(1)[0] > 0.45


def test_a_free_pass_takes_the_longest_draft_and_a_dear_one_none() -> None:
    assert simulate(timeless(Coin(12), FLAT), 0.9, 300)[-1] >= 12
    lengths = simulate(timeless(Coin(12), LINEAR), 0.9, 300)
    assert sum(lengths[50:]) / len(lengths[50:]) < 0.2


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.85])
def test_chosen_lengths_are_near_the_best_fixed_one(rate: float) -> None:
    """Rows cost 15 % of a pass each: judged by the expected rate of what was chosen, within 5 % of the best length."""
    lengths = simulate(timeless(Coin(20), SLOPING), rate, 600)[100:]
    emitted = sum(sum(rate**position for position in range(length + 1)) for length in lengths)
    times = SLOPING(1 + np.arange(21), 0)
    best = (np.cumsum(rate ** np.arange(21)) / times).max()
    assert emitted / times[lengths].sum() > 0.95 * best


def test_expected_gain_is_the_expected_rate_over_no_draft() -> None:
    auto = timeless(Coin(4), FLAT)
    length, gain = auto.choose(2, 1)
    assert (length, gain) == (2, pytest.approx(1 + FIRST_RATE + FIRST_RATE**2))
    assert auto.choose(0, 1) == (0, 1.0)


def test_acceptance_that_improves_is_noticed() -> None:
    auto = timeless(Coin(8), PassCost([1, 32], [10], [[10.0, 10.0 + 31 * 5.0]]))
    assert simulate(auto, 0.05, 300)[-1] == 0
    assert max(simulate(auto, 0.95, 400)[-20:]) >= 4


class Clock:
    """A clock that advances only during the drafts of an ``Expensive`` drafter."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Expensive(Coin):
    """Takes ``ms`` for every token, and ``first_ms`` more for its first draft."""

    def __init__(self, depth: int, clock: Clock, ms: float, first_ms: float = 0.0) -> None:
        super().__init__(depth)
        self.clock, self.ms, self.late = clock, ms, first_ms

    def propose(self, context: Context, budget: int) -> Draft:
        draft = super().propose(context, budget)
        if draft.tokens:
            self.clock.seconds += (self.ms * len(draft) + self.late) / 1e3
            self.late = 0.0
        return draft


def test_an_expensive_drafter_that_never_pays_is_tried_rarely() -> None:
    """Passes of 10 ms, 5 ms per drafted token: drafts pay from a rate of 0.5 on."""
    clock = Clock()
    auto = AdaptiveLength(Expensive(8, clock, 5.0), FLAT, clock)
    lengths = simulate(auto, 0.1, 3000)[300:]
    # Probes may cost 1 % of 10 ms per step. One of 5 ms per token is then made every 50 steps. One that is right leads
    # to further drafts until these are wrong.
    tries = sum(length > 0 for length in lengths)
    assert 2700 / 50 * 0.8 <= tries <= 2700 / 50 * 1.5
    assert sum(lengths) * 5.0 <= 0.02 * 2700 * 10.0


def test_an_expensive_drafter_that_becomes_good_is_noticed() -> None:
    clock = Clock()
    auto = AdaptiveLength(Expensive(8, clock, 5.0), FLAT, clock)
    simulate(auto, 0.1, 1000)
    lengths = simulate(auto, 0.95, 200)
    assert min(lengths[100:]) >= 1


def test_a_stall_does_not_end_drafting() -> None:
    clock = Clock()
    auto = AdaptiveLength(Expensive(4, clock, 0.1, first_ms=200.0), FLAT, clock)
    assert min(simulate(auto, 1.0, 20)[1:]) >= 3


def test_measured_cost_of_the_tiny_model(tiny) -> None:
    verifier = FP16Verifier(tiny, Setup(64))
    cost = measure_pass_cost(verifier, [1, 2, 3], capacity=96)
    assert verifier.cache.length == 3
    assert list(cost.contexts) == [3, 32]
    for times in cost.milliseconds:
        assert len(times) == len(cost.rows)
        assert min(times) > 0
        assert list(times) == sorted(times)  # more rows are never less work
    assert list(measure_pass_cost(verifier, [1, 2, 3], capacity=70).contexts) == [3]
    assert cost.rows[-1] == MAX_ROWS == TAPED_ROWS == GRAPH_ROWS[-1]


def test_in_a_copied_passage_drafts_are_longer_than_outside() -> None:
    """Passages of twenty steps with right drafts alternate with passages of twenty steps with wrong ones."""
    auto = timeless(Coin(12), SLOPING)
    auto.begin(torch.tensor([1]))
    chosen: dict[bool, list[int]] = {True: [], False: []}
    for step in range(400):
        copied = step // 20 % 2 == 0
        draft = auto.propose(Context([1, 1], 1, Sampling(), torch.Generator()), 20)
        # The steps before the first draft of a passage give no information about the passage.
        if step % 20 >= 5 and step >= 200:
            chosen[copied].append(len(draft))
        accepted = len(draft) if copied else 0
        auto.observe(StepResult(draft, [1] * (accepted + 1), list(range(accepted)), torch.zeros(1, 1), None))
    assert min(chosen[True]) == 12
    assert sum(chosen[False]) / len(chosen[False]) < 2


# The time of a pass grows by 6.5 % per row on two CPU cores; on a GPU the rows of a draft are nearly free.
STEEP = PassCost([1, 64], [10], [[10.0, 10.0 + 0.65 * 63]])
CURVES = {"steep": STEEP, "flat": PassCost([1, 64], [10], [[10.0, 10.0]]), "slow": PassCost([1, 2], [10], [[10, 17]])}
PHASES = [(0.0,), (0.1,), (0.5,), (0.9,), (0.0, 0.9), (0.9, 0.0), (0.1, 0.5), (0.5, 0.1), (0.9, 0.1), (0.1, 0.9)]


def decoded(
    cost: PassCost, rates: tuple[float, ...], seed: int, fixed: int | None = None, draft_ms: float = 0
) -> float:
    """Simulate 600 tokens per acceptance rate; return the throughput over that of decoding without drafts.

    fixed: the draft length of every step; None chooses it automatically
    """
    clock, generator = Clock(), random.Random(seed)
    drafter = Expensive(12, clock, draft_ms)
    auto = AdaptiveLength(drafter, cost, clock)
    auto.begin(torch.tensor([1]))
    context = Context([1] * 11, 1, Sampling(), torch.Generator())
    tokens, length = 0, 600
    while tokens < length * len(rates):
        draft = (drafter if fixed is not None else auto).propose(context, 20 if fixed is None else fixed)
        accepted = 0
        while accepted < len(draft) and generator.random() < rates[tokens // length]:
            accepted += 1
        clock.seconds += float(cost(np.array([1 + len(draft)]), 10)[0]) / 1e3
        if fixed is None:
            auto.observe(StepResult(draft, [1] * (accepted + 1), list(range(accepted)), torch.zeros(1, 1), None))
        tokens += accepted + 1
    return tokens * 10.0 / 1e3 / clock.seconds


@pytest.mark.parametrize("rates", PHASES)
@pytest.mark.parametrize("curve", CURVES)
def test_throughput_is_never_below_autoregressive_decoding_and_near_the_best_fixed_length(
    curve: str, rates: tuple[float, ...]
) -> None:
    """Every draft token is right with one probability, which changes in the middle of some simulations."""
    cost = CURVES[curve]
    found = [decoded(cost, rates, seed) for seed in range(3)]
    best = max(sum(decoded(cost, rates, seed, fixed) for seed in range(3)) for fixed in range(13)) / 3
    assert min(found) >= 0.97
    assert sum(found) / 3 >= 0.95 * best


@pytest.mark.parametrize("rates", [(0.0,), (0.1,), (0.5,), (0.9, 0.0)])
@pytest.mark.parametrize("draft_ms", [3.0, 7.5, 15.0])
def test_an_expensive_drafter_costs_at_most_three_percent(draft_ms: float, rates: tuple[float, ...]) -> None:
    """Drafting a token takes 30 % to 150 % of a pass; the first draft, made before its cost is known, counts too."""
    assert min(decoded(STEEP, rates, seed, draft_ms=draft_ms) for seed in range(3)) >= 0.97
