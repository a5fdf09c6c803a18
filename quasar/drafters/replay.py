"""Simulation: a recorded run's acceptance on top of this machine's step times."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import validate_call
from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule, Accepted
from quasar.decoding.draft import Context, Draft
from quasar.decoding.scores import Scores
from quasar.drafters.base import Drafter
from quasar.errors import RequestError
from quasar.results.trace import TracedTurn, read_trace


class ReplayDrafter(Drafter):
    """Drafts as many tokens as a recorded run did and has as many of them accepted, whatever the verifier says.

    Turns the step times of a model, random weights included, into the tokens per second that it would reach at the
    recorded acceptance. The tokens themselves mean nothing, and neither does anything computed from the text.
    Trees are replayed as chains of as many rows.

    trace: ``generations.jsonl`` of the recorded run; a prompt replays the turn whose prompt is closest in length
    """

    @validate_call
    def __init__(self, trace: Path | None = None) -> None:
        if trace is None:
            raise RequestError("drafter=replay needs drafter.trace=FILE, the generations.jsonl of a recorded run")
        self._turns = read_trace(trace)
        self._turn: TracedTurn = self._turns[0]
        self._step = 0
        self._accepted = 0

    @property
    def rule(self) -> AcceptanceRule:
        """Accepts what the trace says."""
        return _ReplayedAcceptance(self)

    @property
    def accepted(self) -> int:
        """Tokens of the last draft that the trace says were kept."""
        return self._accepted

    def begin(self, prompt: Tensor) -> None:
        self._turn = min(self._turns, key=lambda turn: abs(turn.prompt_tokens - len(prompt)))
        self._step = 0

    def propose(self, context: Context, budget: int) -> Draft:
        """The next step of the turn; a turn that is over begins again."""
        step = self._step % len(self._turn.drafted)
        self._step += 1
        drafted = min(self._turn.drafted[step], budget)
        self._accepted = min(self._turn.accepted[step], drafted)
        return Draft.chain([context.last] * drafted)


class _ReplayedAcceptance:
    """Keeps the first tokens of a draft, as many as the drafter was told; the bonus token is the likeliest."""

    def __init__(self, drafter: ReplayDrafter) -> None:
        self._drafter = drafter

    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        count = min(self._drafter.accepted, len(draft))
        return Accepted(list(range(count)), scores.argmax()[count])
