"""Compares speculative output with autoregressive output, and measures how close the logits are where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

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


def compare(
    prompt: Sequence[int], output: Sequence[int], autoregressive: Sequence[int], verifier: Verifier
) -> Comparison:
    """Compare a greedy output with the greedy autoregressive output of the same verifier.

    If they differ, this runs one more prefill to measure ``top2_gap``. A gap as small as a rounding error means that
    rounding decided between two tokens.
    """
    divergence = next(
        (index for index, pair in enumerate(zip_longest(output, autoregressive)) if pair[0] != pair[1]), None
    )
    if divergence is None:
        return Comparison(True)
    context = torch.tensor([*prompt, *output[:divergence]], dtype=torch.int64)
    first, second = verifier.prefill(context).logits[0].float().topk(2).values.tolist()
    return Comparison(False, divergence, first - second)
