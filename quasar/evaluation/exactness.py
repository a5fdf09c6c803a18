"""Is the speculative output the verifier's own autoregressive output, and if not, how close was the tie?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quasar.results.records import Json
from quasar.verifiers.base import Verifier


def compare(prompt: Sequence[int], output: Sequence[int], autoregressive: Sequence[int], verifier: Verifier) -> Json:
    """Greedy output against greedy autoregressive output of the same verifier.

    match_self: whether they are equal; first_divergence: index of the first differing token, or None;
    top2_gap: difference of the verifier's two largest logits there. In 16 bit a block of several rows rounds
    differently from a single row, so ties within rounding may fall either way; in float32 they do not.
    """
    divergence = next(
        (index for index, (ours, theirs) in enumerate(zip(output, autoregressive, strict=False)) if ours != theirs),
        None,
    )
    if divergence is None:
        return {"match_self": len(output) == len(autoregressive), "first_divergence": None, "top2_gap": None}
    context = torch.tensor([*prompt, *output[:divergence]], dtype=torch.int64)
    first, second = verifier.prefill(context).logits[0].float().topk(2).values.tolist()
    return {"match_self": False, "first_divergence": divergence, "top2_gap": first - second}
