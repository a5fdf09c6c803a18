"""Block verification: an exact acceptance rule that decides on the tokens of a draft together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule, Accepted, RejectionSampling
from quasar.decoding.draft import Context, Draft
from quasar.decoding.sampling import Sampling, draw_on_device
from quasar.decoding.scores import Scores


class BlockVerification(AcceptanceRule):
    """Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2).

    The output follows the verifier's sampling distribution exactly, as with `RejectionSampling`, and on average at
    least as many tokens are accepted: a token that is likelier for the verifier than for the drafter makes up for an
    earlier one that is less likely. Trees, and drafts without distributions, are left to `RejectionSampling`.
    """

    description = "block verification: draft tokens with distributions are accepted by their joint probability"

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._token_by_token = RejectionSampling(sampling)

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        if draft.probabilities is None or not draft.is_chain or not draft.tokens:
            return self._token_by_token.accept(draft, scores, context)
        device, size = scores.logits.device, len(draft)
        tokens = torch.tensor(draft.tokens, dtype=torch.int64).to(device, non_blocking=True)
        block = decide(self.sampling.probabilities(scores.logits), draft.probabilities, tokens)
        drawn = torch.rand(size, generator=context.generator, device=device) < block.stop
        # Of all lengths that were drawn, the longest one is accepted; 0 if there is none.
        length = (drawn * torch.arange(1, size + 1, device=device)).amax().view(1)
        bonus = draw_on_device(block.residual.index_select(0, length)[0], context.generator)
        # This is the only synchronization of host and GPU.
        count, token = torch.cat([length, bonus]).tolist()
        return Accepted(list(range(count)), token)


@dataclass(frozen=True)
class Block:
    """What block verification decides on a draft of T tokens.

    stop:     [T]. Entry i - 1 is h_i, the probability that the first i tokens are accepted, given that no longer prefix
              is. So exactly i are accepted with probability h_i (1 - h_{i + 1}) … (1 - h_T)
    residual: [T + 1, V]. Row i is the distribution of the bonus token after i accepted tokens, not normalized
    """

    stop: Tensor
    residual: Tensor


def decide(target: Tensor, proposal: Tensor, tokens: Tensor) -> Block:
    """Return the probabilities of all outcomes for a draft of T > 0 tokens.

    target:   [T + 1, V], the verifier's sampling distributions; row i follows i draft tokens
    proposal: [T, V], the distributions that the draft tokens were drawn from
    tokens:   int64 [T]

    With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)), the residual after i < T tokens is max(0, w_i p - q), and
    h_i is its mass m_i over m_i + 1 - w_i. After all T tokens, the residual is p, and h_T = w_T.

    Example: p = (1/3, 2/3) and q = (2/3, 1/3) at both positions, and the draft is (0, 1). Then
    w_1 = 1/2 and w_2 = min(1, 1/2 · 2) = 1: both tokens are accepted. Token by token, 0 would be rejected with
    probability 1/2.
    """
    size = len(tokens)
    ratios = (target[:size].gather(1, tokens.unsqueeze(1)) / proposal.gather(1, tokens.unsqueeze(1))).squeeze(1)
    weights = [torch.ones_like(ratios[0])]
    for ratio in ratios:
        weights.append((weights[-1] * ratio).clamp(max=1.0))
    joint = torch.stack(weights)
    residual = (joint[:size, None] * target[:size] - proposal).clamp(min=0.0)
    mass = residual.sum(1)
    # A prefix without a residual cannot be the last accepted one. Without rounding, a longer one is accepted then.
    inner = torch.where(mass > 0, mass / (mass + 1.0 - joint[:size]), 0.0)
    # Rounding may still choose such a prefix if p = q. The residual is p then.
    rows = torch.where((mass > 0)[:, None], residual, target[:size])
    return Block(torch.cat([inner[1:], joint[size:]]), torch.cat([rows, target[size:]]))
