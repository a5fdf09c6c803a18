"""Why a run is slower than autoregressive decoding with the same verifier, and which setting to try.

A step takes d for the draft, v for the verification pass and o for the rest, and emits τ tokens. AR-same takes t per
token, the time of a pass with one row. The run is faster above its break-even τ, which is (d + v + o) / t. What a step
takes beyond t has three parts: drafting, d, the additional rows of the pass, v - t, and the rest, o. Either too few
draft tokens are accepted to pay for a step that is cheap, or the largest of the three parts is too expensive.

>>> slow = Step(tau=1.6, rows=6.0, draft_ms=1.0, verify_ms=19.0, overhead_ms=0.4, single_ms=10.0)
>>> round(slow.break_even, 2), slow.speedup < 1, cause(slow)
(2.04, True, 'rows')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quasar.results import metrics
from quasar.results.measured import Measured

Cause = Literal["acceptance", "drafting", "rows", "overhead"]

CHEAP_STEP = 1.35
"""With a break-even τ up to this, a step is cheap: the cost of drafting and of the rows is not the problem."""
RARE = 1.15
"""With a τ up to this, fewer than one step in six gains a token, and no step could be cheap enough."""


@dataclass(frozen=True)
class Step:
    """The mean step of a run, measured, and AR-same beside it.

    tau: tokens per step
    rows: tokens that a verification pass reads, the last token and the draft tokens; a drafter's scratch rows, such as
        Lookahead's window, are not counted
    draft_ms, verify_ms, overhead_ms: milliseconds per step
    single_ms: milliseconds that AR-same takes per token
    """

    tau: float
    rows: float
    draft_ms: float
    verify_ms: float
    overhead_ms: float
    single_ms: float

    @property
    def milliseconds(self) -> float:
        return self.draft_ms + self.verify_ms + self.overhead_ms

    @property
    def break_even(self) -> float:
        """The τ above which the run is faster than AR-same."""
        return self.milliseconds / self.single_ms

    @property
    def speedup(self) -> float:
        return self.tau / self.break_even


def mean_step(run: Measured) -> Step | None:
    """Return the mean step of a run; None if it drafted nothing, did not measure AR-same, or was emulated."""
    single = metrics.ar_same_ms_per_token(run)
    tau = metrics.mean_acceptance_length(run)
    times = metrics.draft_ms(run), metrics.verify_ms(run), metrics.overhead_ms(run)
    if run.emulated or single is None or tau is None or not run.drafted or None in times:
        return None
    draft, verify, overhead = (time or 0.0 for time in times)
    return Step(tau, 1 + run.drafted / run.steps, draft, verify, overhead, single)


def cause(step: Step) -> Cause:
    """Return why the step is too slow for its τ."""
    if step.tau <= RARE or step.break_even <= CHEAP_STEP:
        return "acceptance"
    parts: dict[Cause, float] = {
        "drafting": step.draft_ms,
        "rows": step.verify_ms - step.single_ms,
        "overhead": step.overhead_ms,
    }
    return max(parts, key=lambda part: parts[part])


def explanation(step: Step, drafter: str) -> str | None:
    """Return a sentence on why the run is slower than AR-same and what to try; None if it is not slower.

    drafter: name of the drafter, whose settings may be what to change
    """
    if step.speedup >= 1:
        return None
    reason = cause(step)
    pass_cost = step.verify_ms / step.single_ms
    drafting, overhead = step.draft_ms / step.milliseconds, step.overhead_ms / step.milliseconds
    return (
        f"Slower than AR-same ({step.speedup:.2f}x) because {_REASONS[reason]}: τ is {step.tau:.2f} and would have to "
        f"be {step.break_even:.2f}; a pass that verifies {step.rows:.1f} tokens takes {pass_cost:.2f}x of a step of "
        f"AR-same, drafting {drafting:.0%} and overhead {overhead:.0%} of a step. Try {_remedy(reason, drafter)}."
    )


_REASONS: dict[Cause, str] = {
    "acceptance": "too few draft tokens are accepted",
    "drafting": "drafting is expensive",
    "rows": "the rows of the verification pass are expensive",
    "overhead": "acceptance and bookkeeping take long for so small a model",
}


def _remedy(reason: Cause, drafter: str) -> str:
    if reason == "acceptance":
        others = [name for name in ("ngram", "layerskip", "lookahead") if name != drafter]
        return (
            f"drafter={others[0]} or drafter={others[1]}, or decode.draft_tokens=auto, which drafts only where it pays"
        )
    if reason == "drafting":
        cheaper = {
            "layerskip": "drafter.draft_verifier=int4, or fewer layers with a larger drafter.skip_ratio",
            "model": "verifier@drafter.draft=int4 or another cheaper draft model",
        }.get(drafter, "drafter=ngram, which costs next to nothing")
        return f"{cheaper}, or decode.draft_tokens=auto"
    if reason == "rows":
        smaller = {"lookahead": "drafter.window=3 drafter.guesses=2", "ngram": "drafter.num_tokens=2"}.get(drafter)
        return " or ".join(filter(None, ["decode.draft_tokens=auto", smaller])) + ", for fewer rows per pass"
    return "model=NAME with a larger model, because the overhead does not grow with it"
