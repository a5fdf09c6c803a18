"""Drafting token by token with a model: what layer-skip and draft models share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quasar.decoding.draft import Context, Draft
from quasar.decoding.sampling import draw, most_likely

NextLogits = Callable[[int, int], Tensor]
"""Logits [V] after (token, its offset behind the cached context)."""


def draft_chain(next_logits: NextLogits, context: Context, length: int, confidence: float = 0.0) -> Draft:
    """A chain of at most ``length`` tokens: the argmaxes for greedy decoding, else drawn from the run's sampling
    distribution of the logits, which the draft then carries.

    confidence: the chain ends with the first token whose probability is lower. That token is still offered, as the
        pass that found it is paid for.
    """
    tokens: list[int] = []
    distributions: list[Tensor] = []
    token = context.last
    while len(tokens) < length:
        logits = next_logits(token, len(tokens))
        if context.sampling.greedy:
            token = most_likely(logits.unsqueeze(0))[0]
            sure = confidence == 0.0 or float(logits.float().softmax(-1)[token]) >= confidence
        else:
            distributions.append(context.sampling.probabilities(logits))
            token = draw(distributions[-1], context.generator)
            sure = float(distributions[-1][token]) >= confidence
        tokens.append(token)
        if not sure:
            break
    return Draft.chain(tokens, torch.stack(distributions) if distributions else None)
