"""Coupled sampling: with one seed every drafter leads to the text of autoregressive sampling.

Each statistical test is seeded, so it is deterministic; under a fresh seed it would raise a false alarm with a chance
of ALPHA.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quasar.decoding.acceptance import Coupled, RejectionSampling, rule_for
from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.sampling import Sampling, race
from quasar.decoding.scores import Scores
from quasar.drafters._autoregressive import draft_chain
from quasar.drafters.none import NoneDrafter
from quasar.evaluation.exactness import compare
from quasar.model.loading import random_transformer, tiny_config
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.in_process import Start, starter
from tests.selection import always
from tests.test_acceptance import ALPHA, assert_follows, random_logits
from tests.test_decode import DRAFTERS, EVERYWHERE, ScriptedDrafter, build, draft_model, generate, prompts, trees

DRAWS = 2_000
SAMPLINGS = [
    Sampling(temperature, top_k, top_p, coupled=True)
    for temperature, top_k, top_p in ((0.7, None, 1.0), (1.0, 20, 1.0), (1.3, None, 0.9), (1.0, 30, 0.8))
]


@pytest.mark.parametrize("verifier_name", always(["fp16", "int8"], "fp16"))
def test_every_drafter_leads_to_the_text_of_autoregressive_sampling(verifier_name: str) -> None:
    """In float32, over chains and trees, every sampling setting, and every length modulo the blocks."""
    verifier = build(verifier_name)
    drafters = {name: DRAFTERS[name]() for name in (DRAFTERS if verifier_name == "fp16" else EVERYWHERE)}
    accepted = dict.fromkeys(drafters, 0)
    texts = set()
    for number, (prompt, sampling) in enumerate(zip(prompts(4), SAMPLINGS, strict=True)):
        length = 31 + 7 * number
        expected = generate(NoneDrafter(), verifier, prompt, length, sampling=sampling)
        assert len(expected.tokens) == length
        texts.add(tuple(expected.tokens))
        for name, drafter in drafters.items():
            cap = 2 if number == 1 else None
            found = generate(drafter, verifier, prompt, length, sampling=sampling, draft_tokens=cap)
            assert found.tokens == expected.tokens, (name, prompt, sampling, cap)
            accepted[name] += sum(found.accepted)
    assert len(texts) == 4
    # If no draft were ever right, the comparison would test nothing.
    assert min(accepted.values()) > 0, accepted
    assert accepted["layerskip"] > 20, accepted


@settings(max_examples=40, deadline=None)
@given(st.lists(trees(), max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 3))
def test_any_tree_leaves_the_text_unchanged(drafts: list[Draft], prompt: list[int], chosen: int) -> None:
    verifier = FP16Verifier(random_transformer(tiny_config(vocab_size=4, num_layers=2), 3, torch.float32), Setup(16))
    sampling = SAMPLINGS[chosen]
    expected = generate(NoneDrafter(), verifier, prompt, 20, sampling=sampling).tokens
    assert generate(ScriptedDrafter(drafts), verifier, prompt, 20, sampling=sampling).tokens == expected


def test_the_text_depends_on_seed_and_position() -> None:
    """Equal logits at every position must not lead to equal tokens, nor another seed to the same text."""
    probabilities = torch.full((50,), 1 / 50)
    drawn = {
        (seed, position): int(race(probabilities, seed, position).argmax())
        for seed in (0, 1, 2**62)
        for position in range(40)
    }
    assert all(len({drawn[seed, position] for position in range(40)}) > 15 for seed in (0, 1, 2**62))
    same = sum(drawn[0, position] == drawn[1, position] for position in range(40))
    assert same < 8
    # Neighbouring seeds and positions must not share their noise either.
    assert not torch.equal(race(probabilities, 0, 1), race(probabilities, 1, 0))
    # It does not depend on what was drawn before.
    assert drawn[1, 7] == int(race(probabilities, 1, 7).argmax())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_verifiers_distribution(sampling: Sampling) -> None:
    """Over positions with one seed and over seeds at one position, whatever is drafted."""
    logits = random_logits(3, seed=7)
    expected = Sampling(sampling.temperature, sampling.top_k, sampling.top_p).probabilities(logits)
    rule, generator = Coupled(sampling), torch.Generator()
    over_positions, over_seeds, second = (torch.zeros(logits.shape[1]) for _ in range(3))
    for number in range(DRAWS):
        context = Context([0] * (1 + number), 1, sampling, generator.manual_seed(3))
        over_positions[rule.accept(Draft(), Scores(logits[:1]), context).bonus] += 1
        context = Context([0], 1, sampling, generator.manual_seed(number))
        accepted = rule.accept(Draft([1, 4], [ROOT, ROOT]), Scores(logits), context)
        over_seeds[[1, 4][accepted.path[0]] if accepted.path else accepted.bonus] += 1
        if accepted.path == [1]:
            second[accepted.bonus] += 1
    assert_follows(over_positions, expected[0])
    assert_follows(over_seeds, expected[0])
    if second.sum() > 100:
        assert_follows(second, expected[2])


def test_a_rare_token_is_drawn_as_often_as_it_should_be() -> None:
    """Noise of 24 bits would draw tokens below 1e-7 too often: of 200,000 of them, in 1 of 50 draws."""
    probabilities = torch.full((200_001,), 1e-9)
    probabilities[0] = 1.0
    rare = sum(int(race(probabilities, 5, position).argmax()) != 0 for position in range(100))
    assert stats.binomtest(rare, 100, 2e-4).pvalue > ALPHA


def test_drafts_with_the_same_noise_are_accepted_at_the_rate_of_the_theory() -> None:
    """Two exponential races with common clocks e both choose j if e_i >= e_j max(p_i / p_j, q_i / q_j) for all i, so
    with probability 1 / sum_i max(p_i / p_j, q_i / q_j) (Daliri et al. 2024).
    """
    sampling = Sampling(1.0, coupled=True)
    logits, proposal = random_logits(2, seed=12), random_logits(1, seed=13)
    p, q = (np.asarray(found[0].double().softmax(-1)) for found in (logits, proposal))
    expected = sum(1 / np.maximum(p / p[j], q / q[j]).sum() for j in range(len(p)))
    overlap = np.minimum(p, q).sum()
    assert overlap / (2 - overlap) < expected < overlap  # the paper's bound, and what no coupling can exceed
    hits = 0
    for seed in range(DRAWS):
        context = Context([0], 1, sampling, torch.Generator().manual_seed(seed))
        draft = draft_chain(lambda token, offset: proposal[0], context, 1)
        assert draft.probabilities is None
        hits += len(Coupled(sampling).accept(draft, Scores(logits), context).path)
    assert stats.binomtest(hits, DRAWS, expected).pvalue > ALPHA


def test_a_draft_model_with_the_verifiers_distribution_is_always_right() -> None:
    """Its noise must be that of the right position at every depth."""
    verifier = build("fp16")
    for prompt in prompts(3):
        found = generate(draft_model("fp16"), verifier, prompt, 40, sampling=Sampling(1.0, coupled=True))
        assert found.accepted == found.drafted


def test_the_rule_is_chosen_by_the_sampling_settings() -> None:
    assert isinstance(rule_for(Sampling(1.0, coupled=True)), Coupled)
    assert isinstance(rule_for(Sampling(1.0)), RejectionSampling)


def test_the_gap_of_a_difference_is_that_between_logits_with_noise() -> None:
    verifier, sampling = build("fp16"), Sampling(0.8, coupled=True)
    prompt = [1, 2, 3]
    output = generate(NoneDrafter(), verifier, prompt, 5, sampling=sampling).tokens
    other = [*output[:3], (output[3] + 1) % 64, 0]

    def ranking(logits: torch.Tensor, *, position: int) -> torch.Tensor:
        return sampling.ranking(logits, 0, position)

    assert compare(prompt, output, output, verifier, ranking).match_self
    found = compare(prompt, output, other, verifier, ranking)
    logits = verifier.teacher_forced(torch.tensor([*prompt, *output[:3]]), 0)[-1].double()
    clocks = np.random.Generator(np.random.Philox(key=[0, 6])).standard_exponential(64)
    ranked = (logits / 0.8).log_softmax(-1).numpy() - np.log(clocks)
    first, second = sorted(ranked)[:-3:-1]
    assert int(ranked.argmax()) == output[3]
    assert found.first_divergence == 3
    assert found.top2_gap is not None
    assert math.isclose(found.top2_gap, first - second, rel_tol=1e-4)


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prompt_file: Path
) -> Start:
    return starter(tmp_path, prompt_file, monkeypatch, capfd, tokens=10)


def test_a_run_is_certified_at_temperature_1(start: Start, tmp_path: Path) -> None:
    common = ["decode=sampling", "decode.acceptance=coupled", "evaluate.exactness=true"]
    code, out, err = start(*common, "drafter=layerskip", "hydra.run.dir=a")
    assert code == 0, err
    assert "decode    coupled sampling: " in out
    assert "answers equal autoregressive decoding bit for bit." in out
    assert "DIFFER" not in out
    texts = []
    for drafter in ("ngram", "none"):
        assert start(*common, f"drafter={drafter}", f"hydra.run.dir={drafter}")[0] == 0
        texts.append([line.split('"steps"')[0] for line in Path(drafter, "generations.jsonl").read_text().splitlines()])
    assert texts[0] == texts[1]
    code, _, err = start("decode=sampling", "evaluate.exactness=true", "hydra.run.dir=b")
    assert code == 2
    assert "evaluate.exactness=true: must be null or false with decode.acceptance=exact at decode.temperature=1" in err
