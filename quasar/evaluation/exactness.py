"""Compares speculative output with autoregressive output, and measures how close the logits are where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from quasar.verifiers.base import Verifier


@dataclass(frozen=True)
class Comparison:
    """An output compared with autoregressive decoding.

    match_self: whether the two outputs are equal
    first_divergence: index of the first token that differs, or that only one of them has; None if they are equal
    top2_gap: difference between the two largest values that the token there is the argmax of
    """

    match_self: bool
    first_divergence: int | None = None
    top2_gap: float | None = None


class Ranking(Protocol):
    def __call__(self, logits: Tensor, *, position: int) -> Tensor:
        """Return values [V] whose argmax is the token at a position of the sequence, given its logits [V]."""
        ...


def compare(
    prompt: Sequence[int],
    output: Sequence[int],
    autoregressive: Sequence[int],
    verifier: Verifier,
    ranking: Ranking,
) -> Comparison:
    """Compare an output with the autoregressive output of the same verifier, in greedy decoding or coupled sampling.

    If they differ, this runs one more prefill to measure ``top2_gap``. A gap as small as a rounding error means that
    rounding decided between two tokens.

    ranking: see `quasar.decoding.sampling.Sampling.ranking`
    """
    divergence = next(
        (index for index, pair in enumerate(zip_longest(output, autoregressive)) if pair[0] != pair[1]), None
    )
    if divergence is None:
        return Comparison(True)
    context = torch.tensor([*prompt, *output[:divergence]], dtype=torch.int64)
    values = ranking(verifier.prefill(context).logits[0], position=len(context))
    first, second = values.topk(2).values.tolist()
    return Comparison(False, divergence, first - second)
