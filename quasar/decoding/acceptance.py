"""Acceptance rules: given a draft and the verifier's logits, they choose the accepted path and the bonus token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quasar.decoding.draft import ROOT, Draft
from quasar.decoding.sampling import Sampling, draw, draw_on_device
from quasar.decoding.scores import Scores


@dataclass(frozen=True)
class Accepted:
    """The decision on a draft. path: indices of the accepted draft tokens, root first; bonus: the token after them."""

    path: list[int]
    bonus: int


class AcceptanceRule(Protocol):
    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        """Choose the accepted path and the bonus token, given the verifier's scores of the draft."""
        ...


class Greedy:
    """Follows the verifier's argmax. The output equals the verifier's greedy decoding for every draft."""

    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        targets = scores.argmax()
        path: list[int] = []
        node = ROOT
        while True:
            target = targets[node + 1]
            following = next((child for child in draft.children(node) if draft.tokens[child] == target), None)
            if following is None:
                return Accepted(path, target)
            path.append(following)
            node = following


class RejectionSampling:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1; on trees recursively, SpecInfer, Miao et al. 2024).

    The output follows the verifier's sampling distribution p exactly. A draft token x that was drawn from q is accepted
    with probability min(1, p(x) / q(x)). If it is rejected, p is replaced by the normalized residual max(0, p - q), and
    the next sibling is tried with this p. A deterministic draft has a one-hot q: x is accepted with probability p(x),
    and the residual is p without x. This also holds for siblings drawn without replacement (Sequoia, Chen et al. 2024)
    if the q of each sibling is the distribution that it was drawn from, which excludes the earlier siblings.

    Example: p = (0.5, 0.3, 0.2), and token 0 was drawn from q = (0.8, 0.1, 0.1). It is accepted with probability
    0.5 / 0.8 = 0.625. If it is rejected, the bonus token is drawn from max(0, p - q) = (0, 0.2, 0.1), normalized to
    (0, 2/3, 1/3).
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        logits = scores.logits
        if logits.is_cuda and draft.is_chain:
            return self.accept_chain(draft, scores, generator)
        # Drawing from a distribution with NaN would raise an obscure error.
        scores.require_finite()
        path: list[int] = []
        node = ROOT
        while True:
            target = self.sampling.probabilities(logits[node + 1])
            following: int | None = None
            for child in draft.children(node):
                token = draft.tokens[child]
                proposal = None if draft.probabilities is None else draft.probabilities[child]
                keep = float(target[token]) if proposal is None else float(target[token] / proposal[token])
                if _uniform(generator) < keep:
                    following = child
                    break
                target = _residual(target, proposal, token)
            if following is None:
                return Accepted(path, draw(target, generator))
            path.append(following)
            node = following

    def accept_chain(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        """Same as `accept`, but for drafts without branches, and with a single synchronization of host and GPU.

        It computes the distributions after all draft tokens, whereas `accept` stops at the first rejected token.
        """
        logits = scores.logits
        target, size = self.sampling.probabilities(logits), len(draft)
        tokens = torch.tensor(draft.tokens, dtype=torch.int64).to(logits.device, non_blocking=True).unsqueeze(1)
        if draft.probabilities is None:
            proposal = torch.zeros_like(target[:size]).scatter_(1, tokens, 1.0)
        else:
            proposal = draft.probabilities
        keep = (target[:size].gather(1, tokens) / proposal.gather(1, tokens)).squeeze(1)
        kept = (torch.rand(size, generator=generator, device=logits.device) < keep).cumprod(0).sum().view(1)
        # If all tokens are accepted, nothing is subtracted, and the residual is the distribution itself.
        rejected = torch.cat([proposal, torch.zeros_like(target[:1])])
        final = target.index_select(0, kept)
        residual = (final - rejected.index_select(0, kept)).clamp_(min=0.0)
        bonus = draw_on_device(residual.where(residual.sum() > 0, final)[0], generator)
        count, token = torch.cat([kept, bonus]).tolist()
        return Accepted(list(range(count)), token)


class Typical:
    """Typical acceptance (Medusa, Cai et al. 2024, section 2.3.1). **Lossy**: it does not preserve the distribution.

    A draft token x is typical if p(x) > min(threshold, alpha * exp(-H(p))), where H is the entropy in nats of the
    verifier's sampling distribution p. A likely token is always typical, an unlikely token only if p is flat. The
    longest path of typical tokens is accepted, and the first one if several are equally long. The bonus token is drawn
    from p restricted to typical tokens.
    """

    def __init__(self, sampling: Sampling, threshold: float, alpha: float) -> None:
        self.sampling = sampling
        self.threshold = threshold
        self.alpha = alpha

    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        scores.require_finite()
        target = self.sampling.probabilities(scores.logits)
        typical = target > self._bounds(target).unsqueeze(-1)
        rows = torch.tensor(draft.parents, dtype=torch.int64) + 1
        kept = typical[rows, torch.tensor(draft.tokens, dtype=torch.int64)].tolist()
        path = _longest_kept_path(draft, kept)
        row = path[-1] + 1 if path else 0
        # The most likely token is always typical in exact arithmetic, unless alpha is 1 and p is flat. With rounding
        # there may be no typical token at all.
        candidates = target[row].where(typical[row], 0.0)
        return Accepted(path, draw(candidates if candidates.any() else target[row], generator))

    def _bounds(self, target: Tensor) -> Tensor:
        """Return the probability above which a token is typical, for each row of ``target`` [T + 1, V]."""
        entropy = -torch.special.xlogy(target, target).sum(-1)
        return (self.alpha * (-entropy).exp()).clamp(max=self.threshold)


def rule_for(sampling: Sampling) -> AcceptanceRule:
    """Return the exact rule for a sampling setting: `Greedy` at temperature 0, else `RejectionSampling`."""
    return Greedy() if sampling.greedy else RejectionSampling(sampling)


def _longest_kept_path(draft: Draft, kept: list[bool]) -> list[int]:
    """Return the longest path from the root on which every token is kept; the first one if several are equally long."""
    paths: dict[int, list[int]] = {ROOT: []}
    for node, parent in enumerate(draft.parents):
        if kept[node] and parent in paths:
            paths[node] = [*paths[parent], node]
    return max(paths.values(), key=len)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, device=generator.device))


def _residual(target: Tensor, proposal: Tensor | None, token: int) -> Tensor:
    if proposal is None:
        residual = target.clone()
        residual[token] = 0.0
    else:
        residual = (target - proposal).clamp_(min=0.0)
    mass = residual.sum()
    # The mass is 0 only if p = q and rounding rejected a token all the same. The residual is p then.
    return residual / mass if mass > 0 else target
