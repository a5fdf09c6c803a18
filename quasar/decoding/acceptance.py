"""Acceptance rules: which path of a draft the verifier's logits keep, and which bonus token follows it."""

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
    """path: indices of the accepted draft tokens, root first; bonus: the token that follows them."""

    path: list[int]
    bonus: int


class AcceptanceRule(Protocol):
    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        """Decide on a draft of T tokens, given the verifier's scores of it."""
        ...


class Greedy:
    """Follow the verifier's argmax: the output is the verifier's own greedy decoding, whatever the draft."""

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

    The output follows the verifier's sampling distribution p exactly. A drafted token x from distribution q is
    kept with probability min(1, p(x) / q(x)); on rejection p becomes its residual max(0, p - q), normalized,
    against which the next sibling is tried. A deterministic draft has a one-hot q: x is kept with probability
    p(x), and its residual is p without x. Siblings drawn without replacement (Sequoia, Chen et al. 2024) keep p too:
    each one's q is the distribution it was drawn from, without the siblings before it.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        logits = scores.logits
        if logits.is_cuda and draft.is_chain:
            return self.accept_chain(draft, scores, generator)
        # A distribution of NaN cannot be drawn from.
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
        """`accept` for a chain without a look at any result before the last: on a GPU the host waits once.

        Computes the distributions after all drafted tokens, where `accept` stops at the first that is rejected.
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
        # Behind the last token nothing was rejected, and the residual is the distribution itself.
        rejected = torch.cat([proposal, torch.zeros_like(target[:1])])
        final = target.index_select(0, kept)
        residual = (final - rejected.index_select(0, kept)).clamp_(min=0.0)
        bonus = draw_on_device(residual.where(residual.sum() > 0, final)[0], generator)
        count, token = torch.cat([kept, bonus]).tolist()
        return Accepted(list(range(count)), token)


class Typical:
    """Typical acceptance (Medusa, Cai et al. 2024, section 2.3.1): **lossy**, the output has no model's distribution.

    A drafted token x counts as typical where p(x) > min(threshold, alpha * exp(-H(p))), with H the entropy of the
    verifier's sampling distribution p in nats: a likely token always, an unlikely one where p is flat. The longest
    path of typical tokens is kept, of equal ones the first; the bonus token is drawn from p over its typical tokens.
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
        # The most likely token is below the bound in rounding only, or on it (a flat p with alpha 1).
        candidates = target[row].where(typical[row], 0.0)
        return Accepted(path, draw(candidates if candidates.any() else target[row], generator))

    def _bounds(self, target: Tensor) -> Tensor:
        """The probability above which a token is typical, per row of ``target`` [T + 1, V]."""
        entropy = -torch.special.xlogy(target, target).sum(-1)
        return (self.alpha * (-entropy).exp()).clamp(max=self.threshold)


def rule_for(sampling: Sampling) -> AcceptanceRule:
    """The exact rule for a sampling setting: greedy at temperature 0, else rejection sampling."""
    return Greedy() if sampling.greedy else RejectionSampling(sampling)


def _longest_kept_path(draft: Draft, kept: list[bool]) -> list[int]:
    """The deepest path from the root along which every token is kept, the first of several."""
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
    # The mass vanishes only where rounding rejected a token although p = q: then p itself is the residual.
    return residual / mass if mass > 0 else target
