"""The tests of such a package: Quasar's conformance checks, and what is special about its own classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from my_drafter.drafter import LookupDrafter
from my_drafter.verifier import CachedVerifier

from quasar.decoding.draft import Context
from quasar.decoding.sampling import Sampling
from quasar.drafters.ngram import NgramDrafter
from quasar.testing import check_drafter, check_verifier, tiny_checkpoint, tiny_model
from quasar.verifiers.base import Setup


@pytest.fixture
def verifier(tmp_path: Path) -> CachedVerifier:
    return CachedVerifier(tiny_model(), Setup(folder=tiny_checkpoint(tmp_path)))


def test_the_drafter_keeps_to_its_seam() -> None:
    check_drafter(LookupDrafter())


def test_the_verifier_keeps_to_its_seam(verifier: CachedVerifier) -> None:
    check_verifier(verifier)
    check_drafter(NgramDrafter(), verifier)


@pytest.mark.parametrize(("budget", "expected"), [(2, [3, 1]), (1, [3]), (0, [])])
def test_it_drafts_what_followed_before(budget: int, expected: list[int]) -> None:
    context = Context([1, 2, 3, 1, 2], 5, Sampling(), torch.Generator())
    assert LookupDrafter(num_tokens=2).propose(context, budget).tokens == expected
