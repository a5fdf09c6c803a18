"""The sentence that says why a run is slower than autoregressive decoding: the right cause for measured times."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

from quasar.results import layout, slowness
from quasar.results.console import Reporter
from quasar.results.measured import Measured
from quasar.results.metrics import compute
from quasar.results.report import print_results
from quasar.results.schema import Baselines, Milliseconds, PromptRecord, Timing
from quasar.results.slowness import Step, cause, explanation, mean_step
from tests.records import facts, turn

LOW_TAU = Step(tau=1.05, rows=6.0, draft_ms=0.2, verify_ms=11.5, overhead_ms=0.3, single_ms=10.0)
CHEAP = Step(tau=1.25, rows=3.0, draft_ms=0.2, verify_ms=12.6, overhead_ms=0.3, single_ms=10.0)
EXPENSIVE_ROWS = Step(tau=1.8, rows=6.0, draft_ms=1.0, verify_ms=21.0, overhead_ms=0.5, single_ms=10.0)
EXPENSIVE_DRAFTER = Step(tau=2.4, rows=5.0, draft_ms=14.0, verify_ms=12.0, overhead_ms=0.5, single_ms=10.0)
OVERHEAD = Step(tau=1.6, rows=5.0, draft_ms=0.1, verify_ms=1.2, overhead_ms=0.6, single_ms=1.0)


@pytest.mark.parametrize(
    ("step", "found", "words", "override"),
    [
        (LOW_TAU, "acceptance", "are accepted: τ is 1.05 and would have to be 1.20", "drafter=ngram"),
        (CHEAP, "acceptance", "τ is 1.25 and would have to be 1.31", "drafter=ngram"),
        (EXPENSIVE_ROWS, "rows", "verifies 6.0 tokens takes 2.10x of a step of AR-same", "draft_tokens=auto"),
        (EXPENSIVE_DRAFTER, "drafting", "drafting 53% and overhead 2% of a step", "drafter.draft_verifier=int4"),
        (OVERHEAD, "overhead", "drafting 5% and overhead 32% of a step", "model=NAME"),
    ],
)
def test_each_cause_has_its_sentence(step: Step, found: str, words: str, override: str) -> None:
    assert step.speedup < 1
    assert cause(step) == found
    sentence = explanation(step, "layerskip")
    assert sentence is not None
    assert words in sentence
    assert override in sentence.split("Try ")[1]
    assert sentence.startswith(f"Slower than AR-same ({step.speedup:.2f}x) because ")
    assert sentence.count(". ") == 1, "one sentence, and what to try"


def test_the_cause_is_what_costs_most() -> None:
    assert cause(replace(EXPENSIVE_ROWS, draft_ms=10.9)) == "rows"
    assert cause(replace(EXPENSIVE_ROWS, draft_ms=11.1)) == "drafting"
    # If drafting were free, this run would be faster than AR-same; if its rows cost nothing more, it would not.
    assert replace(EXPENSIVE_DRAFTER, draft_ms=0.0).speedup > 1
    assert replace(EXPENSIVE_DRAFTER, verify_ms=10.0).speedup < 1


def test_a_fast_run_needs_no_explanation() -> None:
    assert explanation(replace(LOW_TAU, tau=1.21), "ngram") is None
    assert replace(LOW_TAU, tau=LOW_TAU.break_even).speedup == 1.0


def test_another_drafter_is_suggested_than_the_one_in_use() -> None:
    for drafter in ("ngram", "lookahead", "layerskip"):
        assert f"drafter={drafter} " not in (explanation(LOW_TAU, drafter) or "").replace(",", " ")


def run_of(verify_ms: float, ar_ms: float | None, drafted: int = 3) -> Measured:
    """Two steps with three draft tokens, of which one is accepted in the first: 3 tokens in 2 steps, τ = 1.5."""
    times = Milliseconds([5.0], [0.5, 1.5], [verify_ms] * 2, [0.25, 0.75], [1.0, 1.0])
    baselines = None if ar_ms is None else Baselines(*[Timing(4, 4 * ar_ms, "here")] * 2)
    taken = [min(1, drafted), 0]
    answer = turn([drafted] * 2, taken, milliseconds=times, baselines=baselines)
    return Measured([PromptRecord("1", "math", [answer])], facts(drafter="ngram"))


def test_the_mean_step_is_what_the_run_measured(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(verify_ms=16.0, ar_ms=8.0)
    step = mean_step(run)
    # Drafting takes 1 ms and observing 1 ms per step, and the other phase 0.5 ms.
    assert step == Step(tau=1.5, rows=4.0, draft_ms=2.0, verify_ms=16.0, overhead_ms=0.5, single_ms=8.0)
    values = compute(run)
    assert step.speedup == pytest.approx(values["speedup_vs_ar_same"])
    assert step.break_even == pytest.approx(18.5 / 8)
    print_results(Reporter(), run, values)
    assert "Slower than AR-same (0.65x) because the rows of the verification pass" in capsys.readouterr().out
    print_results(Reporter(), run_of(verify_ms=6.0, ar_ms=8.0), compute(run_of(verify_ms=6.0, ar_ms=8.0)))
    assert "Slower" not in capsys.readouterr().out


def test_without_drafts_or_baselines_nothing_is_explained() -> None:
    assert mean_step(run_of(verify_ms=16.0, ar_ms=None)) is None
    assert mean_step(run_of(verify_ms=16.0, ar_ms=8.0, drafted=0)) is None


@pytest.mark.parametrize("module", [layout, slowness])
def test_the_examples_in_the_documentation_are_right(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0
