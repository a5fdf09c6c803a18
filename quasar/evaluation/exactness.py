"""Compares speculative output with autoregressive output, and measures how close the logits are where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quasar.verifiers.base import Verifier


@dataclass(frozen=True)
class Comparison:
    """A greedy output compared with autoregressive decoding.

    match_self: whether the two outputs are equal
    first_divergence: index of the first token that differs; None if one output is a prefix of the other
    top2_gap: difference between the verifier's two largest logits at that token
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
        (index for index, (ours, theirs) in enumerate(zip(output, autoregressive, strict=False)) if ours != theirs),
        None,
    )
    if divergence is None:
        return Comparison(len(output) == len(autoregressive))
    context = torch.tensor([*prompt, *output[:divergence]], dtype=torch.int64)
    first, second = verifier.prefill(context).logits[0].float().topk(2).values.tolist()
    return Comparison(False, divergence, first - second)
