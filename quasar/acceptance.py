"""Acceptance rules: which path of a draft the verifier's logits keep, and which bonus token follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quasar.draft import ROOT, Draft
from quasar.sampling import Sampling, draw


@dataclass(frozen=True)
class Accepted:
    """path: indices of the accepted draft tokens, root first; bonus: the token that follows them."""

    path: list[int]
    bonus: int


class AcceptanceRule(Protocol):
    def accept(self, draft: Draft, logits: Tensor, generator: torch.Generator) -> Accepted:
        """Decide on a draft of T tokens. logits: float [T + 1, V]: after the last token and every draft token."""
        ...


class Greedy:
    """Follow the verifier's argmax: the output is the verifier's own greedy decoding, whatever the draft."""

    def accept(self, draft: Draft, logits: Tensor, generator: torch.Generator) -> Accepted:
        targets: list[int] = logits.argmax(-1).tolist()
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
    p(x), and its residual is p without x.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def accept(self, draft: Draft, logits: Tensor, generator: torch.Generator) -> Accepted:
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


def rule_for(sampling: Sampling) -> AcceptanceRule:
    """The exact rule for a sampling setting: greedy at temperature 0, else rejection sampling."""
    return Greedy() if sampling.greedy else RejectionSampling(sampling)


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
