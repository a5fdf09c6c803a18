"""Fidelity against hand-made cases and slow definitions, the trajectory cache, calibration text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quasar.config.schema import CalibrationConfig
from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores
from quasar.decoding.stopping import Limits
from quasar.drafters.ngram import NgramDrafter
from quasar.errors import QuasarError, RequestError
from quasar.evaluation.calibration import calibration_prompts, refuse_overlap
from quasar.evaluation.fidelity import (
    ReferencePath,
    Trajectories,
    Trajectory,
    answer_logits,
    divergence,
    measure,
    trajectory_of,
)
from quasar.evaluation.prompts import Prompt
from quasar.evaluation.repetition import distinct_ngram_ratio
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup, Verifier, VerifierCost
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.pruned import PrunedVerifier

PROMPT = [1, 2, 3, 1, 2, 3, 1, 2]
NO_STOP: frozenset[int] = frozenset()


def model() -> Transformer:
    return random_transformer(tiny_config(vocab_size=64), 0, torch.float32)


def reference() -> FP16Verifier:
    return FP16Verifier(model(), Setup())


def damaged() -> PrunedVerifier:
    return PrunedVerifier(model(), Setup(), method="depth", layers=[2])


def test_divergence_of_hand_made_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    kl, top1 = divergence(torch.stack([p, p]).log(), torch.stack([q, p]).log() + 3.0)  # a shift changes nothing
    assert kl == pytest.approx([0.5 * 0.6931472 - 0.25 * 0.6931472, 0.0], abs=1e-6)
    assert top1 == [False, True]


def test_the_reference_is_faithful_to_itself() -> None:
    trajectory = trajectory_of(reference(), PROMPT, 20, NO_STOP, exact=reference())
    fidelity = measure(reference(), reference(), trajectory)
    assert len(fidelity.kl) == len(trajectory.answer) == 20
    assert max(fidelity.kl) < 1e-9
    assert all(fidelity.top1)
    assert max(trajectory.noise_kl) < 1e-6  # float32: one pass and step by step agree
    assert all(trajectory.noise_top1)
    assert answer_logits(reference(), trajectory).argmax(-1).tolist() == trajectory.answer


def test_the_noise_floor_is_what_16_bit_costs() -> None:
    rounded = FP16Verifier(random_transformer(tiny_config(vocab_size=64), 0, torch.bfloat16), Setup())
    exact = FP16Verifier(random_transformer(tiny_config(vocab_size=64), 0, torch.bfloat16).float(), Setup())
    trajectory = trajectory_of(rounded, PROMPT, 20, NO_STOP, exact)
    kl, top1 = divergence(answer_logits(rounded, trajectory), answer_logits(exact, trajectory))
    assert trajectory.noise_kl == pytest.approx(kl, rel=0.05)
    assert trajectory.noise_top1 == top1
    assert 1e-7 < max(trajectory.noise_kl) < 1e-2
    without = trajectory_of(rounded, PROMPT, 20, NO_STOP)
    assert (without.answer, without.noise_kl, without.noise_top1) == (trajectory.answer, [], [])


def test_teacher_forcing_reads_the_references_answer() -> None:
    trajectory = trajectory_of(reference(), PROMPT, 20, NO_STOP)
    fidelity = measure(reference(), damaged(), trajectory)
    for position in (0, 7, 19):
        context = torch.tensor([*PROMPT, *trajectory.answer[:position]])
        p, q = model()(context)[-1].log_softmax(-1), damaged().model(context)[-1].log_softmax(-1)
        assert fidelity.kl[position] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert fidelity.top1[position] == bool(p.argmax() == q.argmax())


def test_trajectory_ends_at_a_stop_token() -> None:
    free = trajectory_of(reference(), PROMPT, 20, NO_STOP).answer
    stop = free[6]
    assert trajectory_of(reference(), PROMPT, 20, frozenset({stop})).answer == free[: free.index(stop) + 1]


def test_reference_path_needs_draft_verifier_and_reference_to_agree() -> None:
    draft = Draft([5, 6, 7], [ROOT, 0, 1])

    def accepted(verifier_says: Sequence[int], answer: Sequence[int]) -> tuple[list[int], int]:
        logits = torch.nn.functional.one_hot(torch.tensor(verifier_says), 10).float()
        found = ReferencePath(answer).accept(draft, Scores(logits), Context([1], 1, Sampling(), torch.Generator()))
        return list(found.path), found.bonus

    assert accepted([5, 6, 7, 8], [5, 6, 7, 8]) == ([0, 1, 2], 8)
    assert accepted([5, 6, 7, 8], [5, 6, 9, 9]) == ([0, 1], 9)  # the reference emits something else
    assert accepted([5, 1, 7, 8], [5, 6, 7, 8]) == ([0], 6)  # the verifier would not have
    assert accepted([5, 6, 7, 8], [5, 6]) == ([0], 6)  # the last token of the answer is always the bonus


def test_tau_ref_against_its_definition() -> None:
    """Step by step with full passes and no cache: draft, what the verifier says along it, what the reference emits."""
    answer = trajectory_of(reference(), PROMPT, 40, NO_STOP).answer
    verifier, drafter = damaged(), NgramDrafter()
    limits = Limits(len(answer), 2048, NO_STOP)
    found = decode(PROMPT, drafter, verifier, ReferencePath(answer), Sampling(), limits, torch.Generator())
    assert found.tokens == answer

    expected, position = [], 1
    while position < len(answer):
        context = [*PROMPT, *answer[:position]]
        drafted = lookup(context, min(5, len(answer) - position - 1))
        kept = 0
        for token in drafted:
            says = int(verifier.model(torch.tensor([*context, *drafted[:kept]]))[-1].argmax())
            if not token == says == answer[position + kept]:
                break
            kept += 1
        expected.append(kept + 1)
        position += kept + 1
    assert found.emitted == expected
    assert sum(expected) > len(expected)  # something was accepted


def lookup(context: list[int], room: int) -> list[int]:
    """Of the places of the longest suffix, the latest that ``room`` tokens follow, else the one that most follow."""
    for size in (3, 2, 1):
        places = [place for place in range(size, len(context)) if context[place - size : place] == context[-size:]]
        if places:
            full = [place for place in places if place + room <= len(context)]
            return context[(place := full[-1] if full else places[0]) : place + room]
    return []


class StuckVerifier:
    """Says token 7 whatever it reads: easy to draft for, and worthless."""

    device = torch.device("cpu")
    cost = VerifierCost(0, 0)

    def prefill(self, tokens: Tensor) -> Scores:
        return Scores(self._logits(1)[0].unsqueeze(0))

    def verify(self, last: int, draft: Draft) -> Scores:
        return Scores(self._logits(len(draft) + 1))

    def keep(self, path: Sequence[int]) -> None:
        pass

    def _logits(self, rows: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((rows,), 7), 64).float()


def test_a_degenerate_verifier_has_a_long_tau_and_no_tau_ref() -> None:
    answer = trajectory_of(reference(), PROMPT, 60, NO_STOP).answer
    answer = [token if token != 7 else 8 for token in answer]
    limits, sampling = Limits(60, 2048, NO_STOP), Sampling()
    free = decode(PROMPT, NgramDrafter(), StuckVerifier(), Greedy(), sampling, limits, torch.Generator())
    forced = decode(PROMPT, NgramDrafter(), StuckVerifier(), ReferencePath(answer), sampling, limits, torch.Generator())
    assert sum(free.emitted) / len(free.emitted) > 1.5
    assert forced.emitted == [1] * 59
    assert distinct_ngram_ratio(free.tokens) < 0.1


def test_trajectories_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path)

    def get(
        asked: object,
        model: str = "a",
        stop: frozenset[int] = NO_STOP,
        dtype: torch.dtype = torch.float32,
        exact: Callable[[], Verifier] | None = reference,
    ) -> Trajectory:
        answers = Trajectories(model, torch.device("cpu"), dtype, exact)
        return answers.get(asked, PROMPT, 12, stop)  # type: ignore[arg-type]

    def loaded_again() -> Verifier:
        raise AssertionError("the noise floor is cached")

    class Untouchable:
        def __getattr__(self, name: str) -> object:
            raise AssertionError("the trajectory is cached")

    first = get(reference())
    assert len(first.noise_kl) == 12
    assert get(Untouchable(), exact=loaded_again) == first
    for other in ({"model": "b"}, {"stop": frozenset({3})}, {"dtype": torch.bfloat16}, {"exact": None}):
        with pytest.raises(AssertionError, match="cached"):
            get(Untouchable(), **other)


def test_distinct_ngram_ratio() -> None:
    assert distinct_ngram_ratio([1, 2, 3, 4, 1, 2, 3, 4], 4) == 4 / 5
    assert distinct_ngram_ratio([1, 2, 3], 4) is None


def test_broken_logits_name_the_layer() -> None:
    broken = model()
    with torch.no_grad():
        broken.blocks[2].mlp.down.weight[3, 5] = torch.nan
    with pytest.raises(
        QuasarError, match=r"logits of the reference are NaN .* first in the output of blocks\.2\.mlp\."
    ):
        FP16Verifier(broken, Setup()).prefill(torch.tensor(PROMPT))


def prompt(key: str, text: str) -> Prompt:
    return Prompt(key, "chat", (text,), (), f"folder/{key}.jsonl:1")


def test_overlap_of_thirteen_words_is_refused_by_name() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    evaluated = [prompt("eval", f"Say {words} please")]
    with pytest.raises(RequestError, match=r"calibration prompt cal \(cal.jsonl:1\) overlaps evaluation prompt eval"):
        refuse_overlap([prompt("cal", f"Now ONE {words.removeprefix('one ')}!? {words}")], evaluated)
    refuse_overlap([prompt("cal", words.removesuffix(" thirteen") + " fourteen")], evaluated)
    with pytest.raises(RequestError, match="both contain 'hello there'"):
        refuse_overlap([prompt("cal", "Hello there")], [prompt("eval", "hello THERE")])


def test_calibration_prompts_are_drawn_by_seed(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    lines = [json.dumps({"question_id": number, "turns": [f"text {number}"]}) for number in range(30)]
    file.write_text("\n".join(lines))

    def drawn(prompts: int, seed: int) -> list[str]:
        return [found.key for found in calibration_prompts(CalibrationConfig(str(file), prompts, 10, seed))]

    assert len(drawn(8, 0)) == 8
    assert drawn(8, 0) == drawn(8, 0) == sorted(drawn(8, 0), key=int)
    assert drawn(8, 0) != drawn(8, 1)
    assert len(drawn(50, 0)) == 30
