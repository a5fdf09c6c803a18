"""``decode.draft_tokens=auto``: chooses the draft length of each step from recent acceptance and measured costs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.drafters.base import Drafter, FinishedSequence, Resources
from quasar.verifiers.base import Verifier
from quasar.verifiers.timing import pass_milliseconds

MEASURED_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
REPEATS = 7
"""Passes timed per number of rows; the median is used."""
LONG_CONTEXT = 1024

LONGEST = 32
DRAFT_TIMES = 9
FREE_DRAFTS = 1
FREE_EVERY = 500
"""Estimate of the drafting time per position: the lower median of the last `DRAFT_TIMES` drafts. It starts with
`FREE_DRAFTS` entries of zero time, and another zero entry is added after every `FREE_EVERY` steps without a draft.

With a mean, a single slow draft (a first call that allocates, a disturbance) can stop drafting forever, because no
later draft corrects it. In simulations on recorded acceptance, 200 ms more for the first draft cost prompt lookup 24 %
and an INT4 draft model 11 % of their speed. With one zero entry the lower median ignores the first draft. Medians of
five drafts followed noise and cost the model 0.5 %. However slow nine drafts were, the median is zero again after 2,500
steps without a draft. With a zero entry every 200 steps, layer-skip, which is never faster, lost another 0.2 %.
"""
DECAY = 0.95
"""Factor on the weight of older steps for every new step with a draft. About the last twenty steps count."""
REST_DECAY = 0.98
"""The same factor for a step that was chosen to have no draft.

Suppose drafts are accepted with probability p and are worth their cost only from probability q > p on. A draft is tried
again when the weight n of the evidence has decayed so far that (n p + PRIOR_WEIGHT PRIOR_RATE) / (n + PRIOR_WEIGHT)
reaches q. A try adds 1 to n, and every step removes the share 1 - REST_DECAY of n, so that there are
n (1 - REST_DECAY) tries per step. They cost

    n (q - p) (1 - REST_DECAY) = PRIOR_WEIGHT (PRIOR_RATE - q) (1 - REST_DECAY)

tokens per step. This does not depend on p, and it is small if drafts are expensive (q close to PRIOR_RATE). A slower
decay costs less, but stops drafting for longer after bad luck. In simulations on recorded acceptance, the decays 0.95,
0.98 and 0.99 gave layer-skip, which is never faster, 0.979, 0.985 and 0.988 of the speed without drafts. They gave an
INT4 draft model, which is slightly faster, 0.984, 0.981 and 0.976 of the speed at its best fixed length.
"""
PRIOR_WEIGHT = 4.0
PRIOR_RATE = 0.9
"""Prior acceptance rate of the first position, and its weight in steps. The prior of each later position is the rate of
the position before.

The prior is optimistic, because drafts soon correct an estimate that is too high. An estimate that is too low leads to
no drafts and is never corrected.
"""


@dataclass(frozen=True)
class PassCost:
    """Milliseconds t(M) of a verification pass as a function of its number of rows M and the context length.

    rows: the measured numbers of rows, ascending
    contexts: the measured context lengths in tokens, ascending, at least one
    milliseconds: for every context length, the durations by number of rows
    """

    rows: Sequence[int]
    contexts: Sequence[int]
    milliseconds: Sequence[Sequence[float]]

    def __call__(self, rows: np.ndarray, context: int) -> np.ndarray:
        """Return t(M) for every number of rows, which may be fractional; linear between and beyond measured points."""
        times = self._behind(0, rows)
        if len(self.contexts) == 1:
            return times
        # Attention reads the whole context, so the cost of a row grows with the context length.
        share = (context - self.contexts[0]) / (self.contexts[-1] - self.contexts[0])
        return np.maximum(times + share * (self._behind(-1, rows) - times), min(self.milliseconds[0]))

    def _behind(self, index: int, rows: np.ndarray) -> np.ndarray:
        known = self.milliseconds[index]
        slope = max(0.0, (known[-1] - known[-2]) / (self.rows[-1] - self.rows[-2]))
        return np.interp(rows, self.rows, known) + slope * np.maximum(0.0, rows - self.rows[-1])


def measure_pass_cost(verifier: Verifier, prompt: Sequence[int], capacity: int) -> PassCost:
    """Measure passes of 1 to 32 rows after a prompt, and after the prompt repeated up to a long context.

    The verifier's cache contains only the prompt afterwards.

    capacity: size of the verifier's cache in tokens; if a long context does not fit, only the prompt is measured
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
        # The numbers of rows are interleaved, so that a disturbance does not affect only one of them.
        for index, draft in enumerate(drafts):
            laps[index].append(pass_milliseconds(verifier, prompt[-1], draft))
    # The first round may still compile and allocate.
    return [statistics.median(times[1:]) for times in laps]


class RunningAcceptance:
    """Acceptance rate per position over the last steps, among the drafts that were accepted up to that position."""

    def __init__(self) -> None:
        self._tried = np.zeros(LONGEST)
        self._kept = np.zeros(LONGEST)

    def rest(self) -> None:
        """Count a step that was chosen to have no draft. Evidence decays, so that drafts are rarely tried again."""
        self._tried *= REST_DECAY
        self._kept *= REST_DECAY

    def add(self, depth: int, accepted: int) -> None:
        """Count a draft of ``depth`` tokens (0 if the drafter offered none), of which ``accepted`` were accepted."""
        self._tried *= DECAY
        self._kept *= DECAY
        reached = min(depth, accepted + 1, LONGEST)
        self._tried[:reached] += 1
        self._kept[: min(accepted, LONGEST)] += 1

    def reach(self, longest: int = LONGEST) -> list[float]:
        """Return the probability that a draft is accepted up to each position, from 1 to ``longest``.

        Evidence also decays at positions that no recent draft reaches, so that long drafts are tried again.
        """
        rate, probability, reached = PRIOR_RATE, 1.0, []
        for tried, kept in zip(self._tried[:longest].tolist(), self._kept[:longest].tolist(), strict=True):
            rate = (kept + PRIOR_WEIGHT * rate) / (tried + PRIOR_WEIGHT)
            probability *= rate
            reached.append(probability)
        return reached


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
        return slowdown * self.cost(rows, context) + statistics.median_low(self._draft_ms) * lengths

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
        longest = min(budget, self._deepest + 1, LONGEST)
        emitted = np.cumsum([1.0, *self._acceptance.reach(longest)])
        gains = emitted / self._cost.milliseconds(longest, context)
        gains /= gains[0]
        best = int(gains.argmax())
        return best, float(gains[best])
