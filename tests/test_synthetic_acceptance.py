"""Synthetic acceptance: the configured rates, whatever the verifier says, and a run that is labelled a simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy import stats

from quasar.decoding.acceptance import Accepted
from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores
from quasar.decoding.synthetic import Synthetic, rates_for
from tests.in_process import Start, starter

LOGITS = torch.eye(9)
"""The token after row r is r."""


def accepted(rule: Synthetic, draft: Draft, position: int, seed: int = 0) -> Accepted:
    context = Context([0] * position, 1, Sampling(), torch.Generator().manual_seed(seed))
    return rule.accept(draft, Scores(LOGITS[: len(draft) + 1]), context)


@pytest.mark.parametrize(
    ("length", "rates"), [(1.0, []), (1.25, [0.25]), (2.0, [1.0]), (3.5, [1.0, 1.0, 0.5]), (6.0, [1.0] * 5)]
)
def test_a_length_is_the_mean_of_the_tokens_per_step(length: float, rates: list[float]) -> None:
    assert rates_for(length) == rates
    expected, reached = 1.0, 1.0
    for rate in rates:
        reached *= rate
        expected += reached
    assert expected == pytest.approx(length)


def test_draft_tokens_are_accepted_with_the_rates() -> None:
    rule, rates = Synthetic(Sampling(), [0.9, 0.5, 0.2]), [0.9, 0.5, 0.2]
    lengths = [len(accepted(rule, Draft.chain([7] * 5), position).path) for position in range(1, 3001)]
    assert max(lengths) == 3  # the fourth token has no rate
    for depth, rate in enumerate(rates):
        reached = sum(length >= depth for length in lengths)
        kept = sum(length > depth for length in lengths)
        assert stats.binomtest(kept, reached, rate).pvalue > 1e-4
    # The draws are a function of seed and position.
    again = [len(accepted(rule, Draft.chain([3] * 5), position).path) for position in range(1, 3001)]
    assert again == lengths
    other = [len(accepted(rule, Draft.chain([7] * 5), position, seed=1).path) for position in range(1, 3001)]
    assert other != lengths


def test_the_verifier_decides_only_on_the_bonus_token() -> None:
    rule = Synthetic(Sampling(), [1.0] * 3)
    assert accepted(rule, Draft.chain([8, 8]), 1) == Accepted([0, 1], 2)
    assert accepted(rule, Draft.chain([8, 8, 8, 8]), 1) == Accepted([0, 1, 2], 3)
    assert accepted(rule, Draft(), 1) == Accepted([], 0)
    # Of a tree the first branch counts.
    assert accepted(rule, Draft([5, 6, 7, 8], [ROOT, ROOT, 0, 2]), 1) == Accepted([0, 2, 3], 4)
    assert accepted(Synthetic(Sampling(), []), Draft.chain([8]), 1) == Accepted([], 0)


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prompt_file: Path
) -> Start:
    return starter(tmp_path, prompt_file, monkeypatch, capfd, tokens=25)


def test_a_run_is_a_simulation_with_the_length_that_was_asked_for(start: Start) -> None:
    code, out, err = start(
        "drafter=layerskip",
        "decode.acceptance=synthetic",
        "decode.synthetic_length=3",
        "decode.draft_tokens=2",
        "evaluate.baselines=true",
        "evaluate.fidelity=true",
        "hydra.run.dir=out",
    )
    assert code == 0, err
    assert "decode    SIMULATED: draft tokens are accepted with the rates 1, 1; the text means nothing" in out
    assert "(simulated acceptance)" in out
    assert "SIMULATED: step times are measured, but acceptance is replayed or drawn" in out
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["simulated"] is True
    assert summary["mean_acceptance_length"] == 3.0
    assert summary["speedup_vs_ar_same"] is not None
    for text_metric in ("exact_match_to_self", "kl_to_reference", "distinct_4gram_ratio", "mean_acceptance_length_ref"):
        assert summary[text_metric] is None
    assert "lossless" not in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decode.acceptance=synthetic"], "either decode.synthetic_length=TOKENS_PER_STEP or decode.synthetic_rates"),
        (
            ["decode.acceptance=synthetic", "decode.synthetic_length=2", "decode.synthetic_rates=[0.5]"],
            "either decode.synthetic_length=TOKENS_PER_STEP or decode.synthetic_rates",
        ),
        (["decode.acceptance=synthetic", "decode.synthetic_length=0.5"], "decode.synthetic_length=0.5: must be from 1"),
        (
            ["decode.acceptance=synthetic", "decode.synthetic_rates=[0.5,1.5]"],
            "decode.synthetic_rates=[0.5, 1.5]: must be a list of probabilities",
        ),
        (
            ["decode.synthetic_rates=[0.5]"],
            "decode.synthetic_rates=[0.5]: has no effect with decode.acceptance=exact; choose "
            "decode.acceptance=synthetic",
        ),
    ],
)
def test_wrong_rates_are_refused(start: Start, overrides: list[str], message: str) -> None:
    code, _, err = start(*overrides)
    assert code == 2
    assert message in err
