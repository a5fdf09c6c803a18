"""Decodings that share a prompt: the second one rewinds instead of reading it again, and finds the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.experiment.shared_prompt import SharedPrompt
from quasar.model.loading import random_transformer, tiny_config
from quasar.verifiers.base import Setup, Verifier
from quasar.verifiers.fp16 import FP16Verifier

PROMPT, OTHER = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])


@pytest.fixture
def verifier(monkeypatch: pytest.MonkeyPatch) -> FP16Verifier:
    """A verifier that counts its prefills in ``read``."""
    built = FP16Verifier(random_transformer(tiny_config(), 0, torch.bfloat16, "cpu"), Setup(64))
    counted(built, monkeypatch)
    return built


def counted(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    prefill = verifier.prefill

    def counting(tokens: Tensor) -> Scores:
        read.append(tokens.tolist())
        return prefill(tokens)

    monkeypatch.setattr(verifier, "prefill", counting)
    monkeypatch.setattr(verifier, "read", read, raising=False)


def decoded(shared: Any, prompt: Tensor) -> list[Tensor]:
    """The logits of a prefill and of three steps."""
    found = [shared.prefill(prompt).logits.clone()]
    for token in (11, 12, 13):
        found.append(shared.verify(token, Draft.chain([14, 15])).logits.clone())
        shared.keep([0])
    return found


def test_a_second_decoding_of_a_prompt_has_the_bits_of_the_first(verifier: FP16Verifier) -> None:
    shared = SharedPrompt(verifier)
    first, second = decoded(shared, PROMPT), decoded(shared, PROMPT)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert vars(verifier)["read"] == [PROMPT.tolist()]


def test_another_prompt_is_read(verifier: FP16Verifier) -> None:
    shared = SharedPrompt(verifier)
    expected = decoded(verifier, OTHER)
    decoded(shared, PROMPT)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(decoded(shared, OTHER), expected, strict=True))
    decoded(shared, PROMPT)
    assert vars(verifier)["read"] == [OTHER.tolist(), PROMPT.tolist(), OTHER.tolist(), PROMPT.tolist()]


def test_a_verifier_that_cannot_rewind_reads_every_prompt(
    verifier: FP16Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Verifier):
        device = verifier.device

        def prefill(self, tokens: Tensor) -> Scores:
            return verifier.prefill(tokens)

        def verify(self, last: int, draft: Draft) -> Scores:
            return verifier.verify(last, draft)

        def keep(self, path: Any) -> None:
            verifier.keep(path)

        def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
            return verifier.teacher_forced(tokens, first)

    shared = SharedPrompt(Plain())
    first, second = decoded(shared, PROMPT), decoded(shared, PROMPT)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert vars(verifier)["read"] == [PROMPT.tolist()] * 2
