"""Drafts token by token with a model, for both layer-skip and draft models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quasar.decoding.draft import Context, Draft
from quasar.decoding.sampling import most_likely

NextLogits = Callable[[int, int], Tensor]
"""Returns the logits [V] after a token, given (the token, its offset after the cached context)."""


def draft_chain(next_logits: NextLogits, context: Context, length: int, confidence: float = 0.0) -> Draft:
    """Draft at most ``length`` tokens without branches.

    In greedy decoding every token is the argmax. Otherwise it is drawn from the sampling distribution of the logits,
    and the draft contains these distributions. With coupled sampling it is drawn with the random numbers that the
    verifier uses at this position, and the distributions are left out, because the rule does not need them.

    confidence: drafting ends with the first token whose probability is lower. This token is still part of the draft,
        because its pass has already been run
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
            distribution = context.sampling.probabilities(logits)
            token = context.draw(distribution, len(tokens))
            sure = confidence == 0.0 or float(distribution[token]) >= confidence
            if not context.sampling.coupled:
                distributions.append(distribution)
        tokens.append(token)
        if not sure:
            break
    return Draft.chain(tokens, torch.stack(distributions) if distributions else None)
