"""Synthetic acceptance: a simulation of step times for a given share of accepted tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

from quasar.decoding.acceptance import AcceptanceRule, Accepted
from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores


class Synthetic(AcceptanceRule):
    """Accepts draft tokens with given probabilities, whatever the verifier says. **Simulated**: the text means nothing.

    It measures the speed that a drafter would reach with this acceptance. The first tokens of the draft's first branch
    are accepted up to the first one whose draw fails, and the bonus token is the verifier's. The draws depend only on
    the seed and on the position in the sequence.

    rates: probability that the token at depth 1, 2, … is accepted if the one before it is; 0 beyond the last one
    """

    simulated = True

    def __init__(self, sampling: Sampling, rates: Sequence[float]) -> None:
        self.sampling, self.rates = sampling, tuple(rates)
        shown = ", ".join(f"{rate:g}" for rate in rates)
        self.description = f"SIMULATED: draft tokens are accepted with the rates {shown}; the text means nothing"

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        chance = random.Random(f"{context.generator.initial_seed()} {len(context.tokens)}")
        path: list[int] = []
        node = ROOT
        for rate in self.rates:
            children = draft.children(node)
            if not children or chance.random() >= rate:
                break
            node = children[0]
            path.append(node)
        if self.sampling.greedy:
            return Accepted(path, scores.argmax()[node + 1])
        # Drawing from a distribution with NaN would raise an obscure error.
        scores.require_finite()
        return Accepted(path, context.draw(self.sampling.probabilities(scores.logits[node + 1]), len(path)))


def rates_for(length: float) -> list[float]:
    """Return the rates that emit ``length`` tokens per step on average, the bonus token included, if drafts are deep
    enough, with the least variation: 3.4 tokens are two draft tokens, a third one in 40 % of the steps, and the bonus.
    """
    whole = int(length - 1)
    rest = length - 1 - whole
    return [1.0] * whole + ([rest] if rest else [])
