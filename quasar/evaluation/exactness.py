"""Is the speculative output the verifier's own autoregressive output, and if not, how close was the tie?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quasar.verifiers.base import Verifier


@dataclass(frozen=True)
class Comparison:
    """A greedy output against autoregressive decoding.

    match_self: whether they are equal
    first_divergence: index of the first token that differs; None where one is the beginning of the other
    top2_gap: difference of the verifier's two largest logits there
    """

    match_self: bool
    first_divergence: int | None = None
    top2_gap: float | None = None


def compare(
    prompt: Sequence[int], output: Sequence[int], autoregressive: Sequence[int], verifier: Verifier
) -> Comparison:
    """Greedy output against greedy autoregressive output of the same verifier.

    In 16 bit a block of several rows rounds differently from a single row, so ties within rounding may fall either way;
    in float32 they do not.
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
