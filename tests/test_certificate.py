"""The certificate of a run: its answers equal autoregressive decoding, or where they do not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from quasar.decoding.draft import Draft
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores
from quasar.evaluation.exactness import Comparison, compare
from quasar.results.certificate import Certificate, certificate
from quasar.results.measured import Measured
from quasar.results.schema import Exactness, PromptRecord
from quasar.testing import tiny_model
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.in_process import Start, starter
from tests.records import facts, turn

SAME = Exactness(True, None, None)


def certified(*found: Exactness | None, independent: bool = True) -> Certificate | None:
    """Every answer has 1 + 3 + 1 + 4 tokens; the second record is the first repetition of the second prompt."""
    answers = [turn([3, 2, 3], [2, 0, 3], exactness=entry) for entry in found]
    records = [PromptRecord(f"q{index}", "chat", [answer], repetition=index) for index, answer in enumerate(answers)]
    run = Measured(records, facts(dtype="bfloat16", rows_are_independent=independent))
    return certificate(run)


def test_equal_answers_are_certified_with_their_number_of_tokens() -> None:
    assert certified(None) is None
    assert certified(SAME) == Certificate(True, "9 tokens of 1 answer equal autoregressive decoding bit for bit.")
    # An answer that was not compared does not count.
    assert certified(SAME, None, SAME) == Certificate(
        True, "18 tokens of 2 answers equal autoregressive decoding bit for bit."
    )


@pytest.mark.parametrize(
    ("token", "step"),
    [(0, "the prefill's"), (1, "step 0"), (3, "step 0"), (4, "step 1"), (5, "step 2"), (8, "step 2")],
)
def test_the_first_difference_is_named(token: int, step: str) -> None:
    found = certified(SAME, Exactness(False, token, 0.125), Exactness(False, 2, 0.5))
    assert found is not None
    assert not found.holds
    assert found.text == (
        "2 of 3 answers DIFFER from autoregressive decoding with the same verifier, first in prompt q1, turn 0, "
        f"repetition 1 at token {token} ({step}), where the best two choices are 0.125 apart in bfloat16. Decoding was "
        "not lossless: the drafter or the verifier has a fault"
    )


def test_an_output_that_goes_on_differs_behind_its_last_step() -> None:
    found = certified(Exactness(False, 9, 0.0))
    assert found is not None
    assert "at token 9 (after the last step), where the best two choices are 0 apart" in found.text


def test_a_verifier_whose_rows_depend_on_each_other_is_named_as_the_cause() -> None:
    found = certified(Exactness(False, 1, 0.1), independent=False)
    assert found is not None
    assert "in a pass of the INT4 model the rows depend on each other, so that equality is not guaranteed" in found.text
    assert "fault" not in found.text


def test_outputs_are_compared_token_by_token_and_the_gap_is_measured_at_the_first_difference() -> None:
    verifier = FP16Verifier(tiny_model(), Setup())
    prompt, output = [1, 2, 3], [4, 5, 6, 7]
    ranking = partial(Sampling().ranking, seed=0)
    assert compare(prompt, output, output, verifier, ranking) == Comparison(True)
    for other, place in (([4, 5, 9, 9], 2), ([9], 0), ([4, 5], 2), ([4, 5, 6, 7, 8], 4)):
        found = compare(prompt, output, other, verifier, ranking)
        best = verifier.teacher_forced(torch.tensor([*prompt, *output[:place]]), 0)[-1].sort(descending=True).values
        assert (found.match_self, found.first_divergence) == (False, place)
        assert found.top2_gap == pytest.approx(float(best[0] - best[1]), rel=1e-5)


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prompt_file: Path
) -> Start:
    return starter(tmp_path, prompt_file, monkeypatch, capfd, tokens=12)


def test_a_run_prints_its_certificate(start: Start) -> None:
    code, out, _ = start("drafter=ngram", "verifier=int8", "verifier.method=rtn", "evaluate.exactness=true")
    assert code == 0
    assert "answers equal autoregressive decoding bit for bit." in out
    assert "DIFFER" not in out


def test_a_run_that_is_not_lossless_warns(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotaged verifier adds to the logits of a token in proportion to the number of draft tokens in its pass."""
    honest = FP16Verifier.verify

    def verify(self: FP16Verifier, last: int, draft: Draft) -> Scores:
        scores = honest(self, last, draft)
        logits = scores.logits.clone()
        logits[:, 7] += 9.0 * len(draft)
        return Scores(logits)

    monkeypatch.setattr(FP16Verifier, "verify", verify)
    code, out, _ = start("drafter=ngram", "evaluate.exactness=true")
    assert code == 0
    assert "warning: " in out
    assert "answers DIFFER from autoregressive decoding with the same verifier, first in prompt " in out
    assert "the drafter or the verifier has a fault" in out
    assert "bit for bit" not in out


def test_a_verifier_of_bitsandbytes_says_that_its_rows_depend_on_each_other(start: Start) -> None:
    pytest.importorskip("bitsandbytes")
    _, out, _ = start("verifier=bnb_int8")
    assert "; the rows of a pass depend on each other, so that drafts may change the output" in out
    _, out, _ = start("verifier=fp16", "hydra.run.dir=other")
    assert "depend on each other" not in out
