"""``decode.draft_tokens=auto``: chooses the draft length of each step from recent acceptance and measured costs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.drafters._pass_cost import PassCost
from quasar.drafters._probing import ProbeCredit
from quasar.drafters.base import Drafter, FinishedSequence, Resources

LONGEST = 32
DRAFT_TIMES = 9
FREE_DRAFTS = 1
FREE_EVERY = 500
"""Estimate of the drafting time per position: the lower median of the last `DRAFT_TIMES` drafts. It starts with
`FREE_DRAFTS` entries of zero time, and another zero entry is added after every `FREE_EVERY` steps without a draft.

With a mean, a single slow draft (a first call that allocates, a disturbance) can stop drafting for long, because few
later drafts correct it. In simulations on recorded acceptance, 200 ms more for the first draft cost prompt lookup 24 %
and an INT4 draft model 11 % of their speed. With one zero entry the lower median ignores the first draft. Medians of
five drafts followed noise and cost the model 0.5 %. However slow nine drafts were, the median is zero again after 2,500
steps without a draft. With a zero entry every 200 steps, layer-skip, which is never faster, lost another 0.2 %.
"""
DECAY = 0.98
"""Factor on the weight of older steps for every new step: about the last fifty steps count.

Simulated as in tests/test_draft_length.py, where a row costs 6.5 % of a pass: with 0.9, 0.95, 0.98 and 0.99 the speed
over autoregressive decoding is 3.98, 4.00, 4.05 and 4.06 if nine of ten draft tokens are right, 1.54, 1.54, 1.53 and
1.51 if every second one is, and 1.58, 1.56, 1.51 and 1.45 if the rate falls from 0.9 to 0 in the middle. Shorter
memories stop sooner, but also by bad luck: with 0.95 and rows that cost 70 %, drafts of which nine of ten tokens are
right lose 5 % of the best fixed length's speed.
"""
FIRST_WEIGHT = 2.0
FIRST_RATE = 0.75
"""The assumed acceptance rate of the first position and its weight in steps. It fades like older steps: it only decides
how often drafts are tried before there is evidence, and `ProbeCredit` tries them again if they stopped too early."""
DEEPER_WEIGHT = 2.0
"""Weight in steps, at each later position, of the rate of the position before. It does not fade, because few drafts
reach the later positions."""


class RunningAcceptance:
    """Acceptance rate per position over the last steps, among the drafts that were accepted up to that position."""

    def __init__(self) -> None:
        self._tried = np.zeros(LONGEST)
        self._kept = np.zeros(LONGEST)
        self._tried[0], self._kept[0] = FIRST_WEIGHT, FIRST_WEIGHT * FIRST_RATE

    def rest(self) -> None:
        """Count a step that was chosen to have no draft: older evidence loses weight against the next probe.

        The weight of one step remains, so that the estimate itself does not change.
        """
        if self._tried[0] > 1.0:
            self._fade()

    def add(self, depth: int, accepted: int) -> None:
        """Count a draft of ``depth`` tokens, of which ``accepted`` were accepted. Depth 0 is no evidence."""
        if depth == 0:
            return
        self._fade()
        reached = min(depth, accepted + 1, LONGEST)
        self._tried[:reached] += 1
        self._kept[: min(accepted, LONGEST)] += 1

    def reach(self, longest: int = LONGEST) -> list[float]:
        """Return the probability that a draft is accepted up to each position, from 1 to ``longest``.

        Evidence also fades at positions that no recent draft reaches, so that long drafts are tried again.
        """
        tried, kept = self._tried[:longest].tolist(), self._kept[:longest].tolist()
        rate, weight, probability, reached = 0.0, 0.0, 1.0, []
        for tries, hits in zip(tried, kept, strict=True):
            rate = (hits + weight * rate) / (tries + weight)
            weight = DEEPER_WEIGHT
            probability *= rate
            reached.append(probability)
        return reached

    def _fade(self) -> None:
        self._tried *= DECAY
        self._kept *= DECAY


class StepCost:
    """Time of a step as a function of its draft's depth: drafting, estimated from recent drafts, and verification.

    The measured time of a pass is multiplied by the slowdown of recent steps, because a machine's speed may change.
    """

    def __init__(self, cost: PassCost) -> None:
        self.cost = cost
        self._draft_ms = deque([0.0] * FREE_DRAFTS, maxlen=DRAFT_TIMES)
        self._without_draft = 0
        self._depths, self._drafted = 0.0, 0.0
        self._scratch_rows = 0
        self._passed_ms, self._expected_ms = 0.0, 0.0

    def milliseconds(self, longest: int, context: int) -> np.ndarray:
        """Return the time of a step after ``context`` tokens, for drafts of depth 0 to ``longest``."""
        lengths = np.arange(longest + 1)
        rows = 1 + (self._drafted / self._depths if self._depths else 1.0) * lengths + self._scratch_rows
        rows[0] = 1
        slowdown = self._passed_ms / self._expected_ms if self._passed_ms else 1.0
        milliseconds: np.ndarray = slowdown * self.cost(rows, context) + statistics.median_low(self._draft_ms) * lengths
        return milliseconds

    def add(self, draft: Draft, context: int, draft_ms: float, pass_ms: float) -> None:
        """Count a step after ``context`` tokens. pass_ms: time of the whole step after drafting."""
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
    """Wraps a drafter and limits each draft to the length L that maximizes the expected tokens per second:

        (1 + a_1 + … + a_L) / (c t(1 + r L + s) + d L)

    Here a_i is the recent probability that a draft is accepted up to position i, t the measured time of a pass, c the
    slowdown of recent steps, r the draft rows per position (1 without branches), s the scratch rows, and d the
    drafting time per position. L = 0 means no draft. The expected gain is this rate divided by the rate for L = 0.

    If L = 0 is best, the best other length is tried from time to time, so that an acceptance that has risen is noticed.
    `ProbeCredit` bounds what these probes cost to 1 % of the time. Decoding is therefore hardly slower than without
    drafts, whatever the drafter offers.

    Example: if t = 10 ms for any number of rows, d = 1 ms, c = 1, s = 0 and a = (0.8, 0.4, 0.1), the rates for L = 0 to
    3 are 1 / 10, 1.8 / 11, 2.2 / 12 and 2.3 / 13 tokens per ms, so L = 2 is chosen with a gain of 1.83.

    Acceptance is bursty: in the middle of a copied passage, one accepted draft follows another. Acceptance is therefore
    counted separately for drafts after a completely accepted draft and for all others. The estimates are kept from
    prompt to prompt. Because the choice depends on measured times, two runs that sample may draw different texts.
    Greedy output and coupled samples do not depend on it.

    clock: returns seconds since any fixed time
    """

    def __init__(self, drafter: Drafter, cost: PassCost, clock: Callable[[], float] = time.perf_counter) -> None:
        self.drafter = drafter
        self.details, self.weight_bytes = drafter.details, drafter.weight_bytes
        self._cost, self._clock = StepCost(cost), clock
        self._after_hit, self._after_miss = RunningAcceptance(), RunningAcceptance()
        self._acceptance = self._after_miss
        self._deepest = 3
        self._credit, self._probe_ms = ProbeCredit(), 0.0
        self._started, self._drafted, self._context = 0.0, 0.0, 0
        self._chosen: list[int | float | str] = []
        self._gains: list[int | float | str] = []

    @property
    def rule(self) -> AcceptanceRule | None:
        return self.drafter.rule

    def prepare(self, resources: Resources) -> None:
        self.drafter.prepare(resources)
        self.details = self.drafter.details
        self.weight_bytes = self.drafter.weight_bytes

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        """Pass the sequences on. The estimates start again, because they describe the speed of this process."""
        self.drafter.start(finished)

    def begin(self, prompt: Tensor) -> None:
        self._chosen, self._gains = [], []
        self._acceptance = self._after_miss
        self.drafter.begin(prompt)

    def propose(self, context: Context, budget: int) -> Draft:
        self._context = len(context.tokens) - 1
        length, gain = self.choose(budget, self._context)
        self._probe_ms = 0.0
        if length == 0 and budget > 0:
            length = self._probe(budget)
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
        if step.cut:
            # Nothing was rejected: the output ended inside the draft, and what is behind its end was not tried.
            self._acceptance.add(len(step.path), len(step.path))
        elif self._chosen[-1]:
            self._acceptance.add(depth, len(step.path))
        else:
            self._acceptance.rest()
        if depth > 0:
            self._credit.spend(self._probe_ms)
            self._acceptance = self._after_hit if len(step.path) == depth else self._after_miss
        self.drafter.observe(step)

    def rewind(self, length: int) -> None:
        self.drafter.rewind(length)

    def notes(self) -> dict[str, list[int | float | str]]:
        """Return the chosen length and its expected gain, in addition to the wrapped drafter's notes."""
        return {"chosen_length": self._chosen, "expected_gain": self._gains, **self.drafter.notes()}

    def choose(self, budget: int, context: int) -> tuple[int, float]:
        """Return the best length after ``context`` tokens and its expected gain.

        The length is at most ``budget``, and at most one more than the deepest draft so far.
        """
        gains, _ = self._gains_and_times(budget, context)
        best = int(gains.argmax())
        return best, float(gains[best])

    def _probe(self, budget: int) -> int:
        """Return the length of a probe, the best one apart from 0, or 0 if the credit does not cover it."""
        gains, milliseconds = self._gains_and_times(budget, self._context)
        length = int(gains[1:].argmax()) + 1
        cost = float(milliseconds[length] - milliseconds[0])
        self._credit.earn(float(milliseconds[0]), cost)
        if not self._credit.affords(cost):
            return 0
        self._probe_ms = cost
        return length

    def _gains_and_times(self, budget: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected gain and the milliseconds of a step for every length from 0 on."""
        longest = min(budget, self._deepest + 1, LONGEST)
        emitted = np.cumsum([1.0, *self._acceptance.reach(longest)])
        milliseconds = self._cost.milliseconds(longest, context)
        rates = emitted / milliseconds
        return rates / rates[0], milliseconds
