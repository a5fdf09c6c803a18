"""``decode.draft_tokens=auto``: each step's draft as long as acceptance so far and the verifier's cost make it pay."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.decoding.stopwatch import Stopwatch
from quasar.drafters.base import Drafter, Resources
from quasar.verifiers.base import Verifier

MEASURED_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
REPEATS = 7
"""Passes per number of rows, whose median counts."""
LONG_CONTEXT = 1024

LONGEST = 32
DRAFT_TIMES = 9
FREE_DRAFTS = 1
FREE_EVERY = 500
"""Latest drafts whose lower median time per position counts, how many free ones it begins with, and after how many
steps without a draft another free one is put among them.

A mean lets one stall (a first call that allocates, a disturbance) end drafting for good, as without drafts no time
corrects it: in simulations on recorded acceptance 200 ms more for the first draft cost prompt lookup 24 % and an INT4
draft model 11 % of their speed. Behind a free draft the first one says nothing; medians of five drafts followed noise
and cost the model 0.5 %. Whatever nine drafts took, drafting is free again after 2,500 steps without; with a free
draft every 200 steps layer-skip, which never pays, lost 0.2 % more.
"""
DECAY = 0.95
"""Weight of a step's acceptance after each later one that is counted with it: the last twenty count."""
REST_DECAY = 0.98
"""The same for a step that was not to draft.

Where drafts are right with a probability p too low to pay, and would pay from q on, they are tried again whenever
evidence has faded so far that (n p + PRIOR_WEIGHT PRIOR_RATE) / (n + PRIOR_WEIGHT) reaches q. A try adds one to n, a
step takes the share 1 - REST_DECAY, so that n (1 - REST_DECAY) tries are made per step, which lose

    n (q - p) (1 - REST_DECAY) = PRIOR_WEIGHT (PRIOR_RATE - q) (1 - REST_DECAY)

tokens, however bad they are, and little where drafts are dear (q close to PRIOR_RATE). Slower fading loses less of
that, but gives up longer after bad luck: in simulations on recorded acceptance 0.95, 0.98 and 0.99 gave layer-skip,
which never pays, 0.979, 0.985 and 0.988 of the speed without drafts, and an INT4 draft model, which just pays, 0.984,
0.981 and 0.976 of that at its best fixed length.
"""
PRIOR_WEIGHT = 4.0
PRIOR_RATE = 0.9
"""What is believed of the first position before anything is known; each later position begins like the one before.

Too much rather than too little: what is believed wrongly of drafts that are made is soon corrected, of drafts that are
not made never.
"""


@dataclass(frozen=True)
class PassCost:
    """Milliseconds of a verification pass by its number of rows and the context behind which it runs, t(M).

    rows: the measured numbers of rows, ascending
    contexts: the measured contexts in tokens, ascending, at least one
    milliseconds: for every context the durations by number of rows
    """

    rows: Sequence[int]
    contexts: Sequence[int]
    milliseconds: Sequence[Sequence[float]]

    def __call__(self, rows: np.ndarray, context: int) -> np.ndarray:
        """t(M) of every number of rows, which need not be whole: linear between and beyond what was measured."""
        times = self._behind(0, rows)
        if len(self.contexts) == 1:
            return times
        # Attention reads the whole context, so that the cost of a row grows with it.
        share = (context - self.contexts[0]) / (self.contexts[-1] - self.contexts[0])
        return np.maximum(times + share * (self._behind(-1, rows) - times), min(self.milliseconds[0]))

    def _behind(self, index: int, rows: np.ndarray) -> np.ndarray:
        known = self.milliseconds[index]
        slope = max(0.0, (known[-1] - known[-2]) / (self.rows[-1] - self.rows[-2]))
        return np.interp(rows, self.rows, known) + slope * np.maximum(0.0, rows - self.rows[-1])


def measure_pass_cost(verifier: Verifier, prompt: Sequence[int], capacity: int) -> PassCost:
    """Time passes of 1 to 32 rows behind a prompt, and behind its repetition up to a long context.

    Leaves the verifier's cache with the prompt alone.

    capacity: tokens that the verifier has room for; where a long context does not fit, the prompt's own counts alone
    """
    long = min(LONG_CONTEXT, capacity - MEASURED_ROWS[-1])
    contexts = [len(prompt), long] if long > 2 * len(prompt) else [len(prompt)]
    measured = {length: _pass_milliseconds(verifier, list(islice(cycle(prompt), length))) for length in contexts[::-1]}
    return PassCost(MEASURED_ROWS, contexts, [measured[length] for length in contexts])


def _pass_milliseconds(verifier: Verifier, prompt: Sequence[int]) -> list[float]:
    verifier.prefill(torch.tensor(prompt, dtype=torch.int64))
    drafts = [Draft.chain([prompt[-1]] * (rows - 1)) for rows in MEASURED_ROWS]
    laps: list[list[float]] = [[] for _ in drafts]
    for _ in range(REPEATS + 1):
        # Interleaved, so that a disturbance does not fall on one number of rows alone.
        for index, draft in enumerate(drafts):
            clock = Stopwatch(verifier.device)
            verifier.verify(prompt[-1], draft)
            clock.lap("verify")
            laps[index] += clock.milliseconds()["verify"]
    # The first round may still compile and allocate.
    return [statistics.median(times[1:]) for times in laps]


class RunningAcceptance:
    """Which share of the drafts that were right up to a position were right there too, over the last steps."""

    def __init__(self) -> None:
        self._tried = np.zeros(LONGEST)
        self._kept = np.zeros(LONGEST)

    def rest(self) -> None:
        """A step that was not to draft: evidence fades, so that what once did not pay is tried again, but rarely."""
        self._tried *= REST_DECAY
        self._kept *= REST_DECAY

    def add(self, depth: int, accepted: int) -> None:
        """A draft ``depth`` tokens deep (0 where the drafter had none), ``accepted`` of which were kept."""
        self._tried *= DECAY
        self._kept *= DECAY
        reached = min(depth, accepted + 1, LONGEST)
        self._tried[:reached] += 1
        self._kept[: min(accepted, LONGEST)] += 1

    def reach(self, longest: int = LONGEST) -> list[float]:
        """Probability that a draft is right up to each position, from 1 to ``longest``.

        Evidence fades where no drafts reach, so that lengths which once did not pay are tried again.
        """
        rate, probability, reached = PRIOR_RATE, 1.0, []
        for tried, kept in zip(self._tried[:longest].tolist(), self._kept[:longest].tolist(), strict=True):
            rate = (kept + PRIOR_WEIGHT * rate) / (tried + PRIOR_WEIGHT)
            probability *= rate
            reached.append(probability)
        return reached


class StepCost:
    """What a step costs by the depth of its draft: drafting as in the last drafts, and a verification pass.

    The pass takes what was measured, times how much slower the last steps were than that: machines change their speed.
    """

    def __init__(self, cost: PassCost) -> None:
        self.cost = cost
        self._draft_ms = deque([0.0] * FREE_DRAFTS, maxlen=DRAFT_TIMES)
        self._without_draft = 0
        self._depths, self._drafted = 0.0, 0.0
        self._scratch_rows = 0
        self._passed_ms, self._expected_ms = 0.0, 0.0

    def milliseconds(self, longest: int, context: int) -> np.ndarray:
        """Of steps behind ``context`` tokens whose drafts are 0 to ``longest`` tokens deep."""
        lengths = np.arange(longest + 1)
        rows = 1 + (self._drafted / self._depths if self._depths else 1.0) * lengths + self._scratch_rows
        rows[0] = 1
        slowdown = self._passed_ms / self._expected_ms if self._passed_ms else 1.0
        return slowdown * self.cost(rows, context) + statistics.median_low(self._draft_ms) * lengths

    def add(self, draft: Draft, context: int, draft_ms: float, pass_ms: float) -> None:
        """A step behind ``context`` tokens: the time that its draft took, and everything after that."""
        self._passed_ms = DECAY * self._passed_ms + pass_ms
        self._expected_ms = DECAY * self._expected_ms + float(self.cost(np.array([draft.rows]), context)[0])
        if draft.scratch is not None:
            self._scratch_rows = len(draft.scratch.tokens)
        if draft.tokens:
            depth = max(draft.depths())
            self._draft_ms.append(draft_ms / depth)
            self._depths = DECAY * self._depths + depth
            self._drafted = DECAY * self._drafted + len(draft)
        else:
            self._without_draft += 1
            if self._without_draft % FREE_EVERY == 0:
                self._draft_ms.append(0.0)


class AdaptiveLength(Drafter):
    """A drafter whose drafts are capped, step by step, at the length L that maximizes expected tokens per second:

        (1 + a_1 + … + a_L) / (c t(1 + r L + s) + d L)

    with a_i the running share of drafts that are right up to position i, t the verifier's measured cost, c how much
    slower the last steps were than measured, r draft rows per position (1 for a chain), s the scratch rows, and d the
    drafter's time per position. L = 0 drafts nothing. The expected gain is that rate over the rate of L = 0.

    Text is bursty: in the middle of a copied passage drafts go on being right. So acceptance is counted apart for
    drafts that follow one which was accepted whole, and for all others. What is learned carries over from prompt to
    prompt. As the choice depends on measured times, two runs that sample may draw different texts; greedy output never
    depends on it.

    clock: seconds that have passed since any fixed time
    """

    def __init__(self, drafter: Drafter, cost: PassCost, clock: Callable[[], float] = time.perf_counter) -> None:
        self.drafter = drafter
        self.details = drafter.details
        self._cost, self._clock = StepCost(cost), clock
        self._after_hit, self._after_miss = RunningAcceptance(), RunningAcceptance()
        self._acceptance = self._after_miss
        self._deepest = 3
        self._started, self._drafted, self._context = 0.0, 0.0, 0
        self._chosen: list[int | float | str] = []
        self._gains: list[int | float | str] = []

    @property
    def rule(self) -> AcceptanceRule | None:
        return self.drafter.rule

    def prepare(self, resources: Resources) -> None:
        self.drafter.prepare(resources)
        self.details = self.drafter.details

    def begin(self, prompt: Tensor) -> None:
        self._chosen, self._gains = [], []
        self._acceptance = self._after_miss
        self.drafter.begin(prompt)

    def propose(self, context: Context, budget: int) -> Draft:
        self._context = len(context.tokens) - 1
        length, gain = self.choose(budget, self._context)
        self._chosen.append(length)
        self._gains.append(round(gain, 4))
        self._started = self._clock()
        draft = self.drafter.propose(context, length)
        self._drafted = self._clock()
        return draft

    def observe(self, step: StepResult) -> None:
        self._cost.add(
            step.draft, self._context, (self._drafted - self._started) * 1e3, (self._clock() - self._drafted) * 1e3
        )
        depth = max(step.draft.depths(), default=0)
        self._deepest = max(self._deepest, depth)
        if self._chosen[-1]:
            self._acceptance.add(depth, len(step.path))
        else:
            self._acceptance.rest()
        if depth > 0:
            self._acceptance = self._after_hit if len(step.path) == depth else self._after_miss
        self.drafter.observe(step)

    def notes(self) -> dict[str, list[int | float | str]]:
        """The chosen length and its expected gain, and what the drafter itself notes."""
        return {"chosen_length": self._chosen, "expected_gain": self._gains, **self.drafter.notes()}

    def choose(self, budget: int, context: int) -> tuple[int, float]:
        """The best length behind ``context`` tokens and its expected gain.

        At most ``budget``, and one more than the drafter ever offered.
        """
        longest = min(budget, self._deepest + 1, LONGEST)
        emitted = np.cumsum([1.0, *self._acceptance.reach(longest)])
        gains = emitted / self._cost.milliseconds(longest, context)
        gains /= gains[0]
        best = int(gains.argmax())
        return best, float(gains[best])
