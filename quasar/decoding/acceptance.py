"""Acceptance rules: given a draft and the verifier's logits, they choose the accepted path and the bonus token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.sampling import Sampling, draw, draw_on_device
from quasar.decoding.scores import Scores


@dataclass(frozen=True)
class Accepted:
    """The decision on a draft.

    path: indices of the accepted draft tokens, root first
    bonus: the token after them
    targets: from a rule that preserves a distribution, the distribution [V] that every emitted token follows, those of
        the path and the bonus token; empty from other rules
    """

    path: list[int]
    bonus: int
    targets: Sequence[Tensor] = field(default=(), compare=False)


class AcceptanceRule(ABC):
    """Decides which draft tokens are kept.

    lossy:       whether the output does not follow the verifier's distribution
    simulated:   whether acceptance does not depend on the verifier's logits, so that the output means nothing
    description: what the header and the table of a run say about the rule; empty for the usual rules
    """

    lossy: bool = False
    simulated: bool = False
    description: str = ""

    @abstractmethod
    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        """Choose the accepted path and the bonus token, given the verifier's scores of the draft after ``context``."""


class Greedy(AcceptanceRule):
    """Follows the verifier's argmax. The output equals the verifier's greedy decoding for every draft."""

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        return _follow(draft, scores.argmax().__getitem__)


class Coupled(AcceptanceRule):
    """Drafter-invariant sampling (Daliri, Musco and Suresh 2024, arXiv 2408.07978).

    The token at every position of the sequence is drawn from the verifier's sampling distribution with random numbers
    that depend only on the seed and on the position (`race`). A draft token is kept if it is this token. So the output
    follows the verifier's distribution, and with the same seed it is the same text for every draft: that of
    autoregressive sampling.

    Example: the verifier's token after the context is 7 and the token after it is 2. The draft (7, 5) keeps 7, and the
    bonus token is 2. Without a draft, two steps emit 7 and 2.
    """

    description = "coupled sampling: with this seed every drafter leads to the text of autoregressive sampling"

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        depths = [0, *draft.depths()]

        def drawn(row: int) -> Tensor:
            # Every distribution is computed from one row [V], because some reductions over [R, V] depend on R.
            return context.race(self.sampling.probabilities(scores.logits[row]), depths[row]).argmax()

        if scores.logits.is_cuda:
            # The tokens of all rows, which the path may not reach, cost less than a synchronization for each.
            return _follow(draft, torch.stack([drawn(row) for row in range(len(depths))]).tolist().__getitem__)
        return _follow(draft, lambda row: int(drawn(row)))


class RejectionSampling(AcceptanceRule):
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

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        logits, generator = scores.logits, context.generator
        if logits.is_cuda and draft.is_chain:
            return self.accept_chain(draft, scores, context)
        # Drawing from a distribution with NaN would raise an obscure error.
        scores.require_finite()
        path: list[int] = []
        targets: list[Tensor] = []
        node = ROOT
        while True:
            target = self.sampling.probabilities(logits[node + 1])
            targets.append(target)
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
                return Accepted(path, draw(target, generator), targets)
            path.append(following)
            node = following

    def accept_chain(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        """Same as `accept`, but for drafts without branches, and with a single synchronization of host and GPU.

        It computes the distributions after all draft tokens, whereas `accept` stops at the first rejected token.
        """
        logits, generator = scores.logits, context.generator
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
        return Accepted(list(range(count)), token, target[: count + 1].unbind())


class Typical(AcceptanceRule):
    """Typical acceptance (Medusa, Cai et al. 2024, section 2.3.1). **Lossy**: it does not preserve the distribution.

    A draft token x is typical if p(x) > min(threshold, alpha * exp(-H(p))), where H is the entropy in nats of the
    verifier's sampling distribution p. A likely token is always typical, an unlikely token only if p is flat. The
    longest path of typical tokens is accepted, and the first one if several are equally long. The bonus token is drawn
    from p restricted to typical tokens.
    """

    lossy = True
    description = "typical acceptance: lossy, it does not preserve the verifier's distribution"

    def __init__(self, sampling: Sampling, threshold: float, alpha: float) -> None:
        self.sampling = sampling
        self.threshold = threshold
        self.alpha = alpha

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
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
        return Accepted(path, draw(candidates if candidates.any() else target[row], context.generator))

    def _bounds(self, target: Tensor) -> Tensor:
        """Return the probability above which a token is typical, for each row of ``target`` [T + 1, V]."""
        entropy = -torch.special.xlogy(target, target).sum(-1)
        return (self.alpha * (-entropy).exp()).clamp(max=self.threshold)


def rule_for(sampling: Sampling) -> AcceptanceRule:
    """Return the exact rule for these settings: `Greedy` at temperature 0, else `Coupled` or `RejectionSampling`."""
    if sampling.greedy:
        return Greedy()
    return Coupled(sampling) if sampling.coupled else RejectionSampling(sampling)


def _follow(draft: Draft, target: Callable[[int], int]) -> Accepted:
    """Walk down the tree as long as a child is the target token; the target that no child matches is the bonus token.

    target: returns the token that follows a row of the pass
    """
    path: list[int] = []
    node = ROOT
    while True:
        token = target(node + 1)
        following = next((child for child in draft.children(node) if draft.tokens[child] == token), None)
        if following is None:
            return Accepted(path, token)
        path.append(following)
        node = following


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
