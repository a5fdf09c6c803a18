"""Simulation: combines the acceptance of an earlier run with the step times of this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import validate_call
from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule, Accepted
from quasar.decoding.draft import Context, Draft
from quasar.decoding.scores import Scores
from quasar.drafters.base import Drafter
from quasar.errors import RequestError
from quasar.results.trace import TracedTurn, read_trace


class ReplayDrafter(Drafter):
    """Drafts and accepts as many tokens per step as an earlier run did, regardless of the verifier's logits.

    This measures the tokens per second that a model, even one with random weights, would reach with the acceptance of
    the earlier run. The generated tokens are meaningless, and so is everything computed from the text. A tree is
    replayed as a draft without branches that has the same number of tokens.

    trace: ``generations.jsonl`` of the earlier run; each prompt replays the turn whose prompt is closest in length
    """

    simulates = True

    @validate_call
    def __init__(self, trace: Path | None = None) -> None:
        if trace is None:
            raise RequestError("drafter=replay needs drafter.trace=FILE, the generations.jsonl of an earlier run")
        self._turns = read_trace(trace)
        self._turn: TracedTurn = self._turns[0]
        self._step = 0
        self._accepted = 0

    @property
    def chooses_size(self) -> bool:
        """The earlier run has chosen it."""
        return True

    @property
    def rule(self) -> AcceptanceRule:
        """The rule that accepts as many tokens as the trace."""
        return _ReplayedAcceptance(self)

    @property
    def accepted(self) -> int:
        """Number of tokens of the last draft that the trace accepted."""
        return self._accepted

    def begin(self, prompt: Tensor) -> None:
        self._turn = min(self._turns, key=lambda turn: abs(turn.prompt_tokens - len(prompt)))
        self._step = 0

    def propose(self, context: Context, budget: int) -> Draft:
        """Replay the next step of the turn. After its last step the turn starts again."""
        step = self._step % len(self._turn.drafted)
        self._step += 1
        drafted = min(self._turn.drafted[step], budget)
        self._accepted = min(self._turn.accepted[step], drafted)
        return Draft.chain([context.last] * drafted)


class _ReplayedAcceptance(AcceptanceRule):
    """Accepts the number of draft tokens that the drafter gives. The bonus token is the argmax."""

    simulated = True
    description = "SIMULATED: acceptance is replayed from an earlier run; the text means nothing"

    def __init__(self, drafter: ReplayDrafter) -> None:
        self._drafter = drafter

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        count = min(self._drafter.accepted, len(draft))
        return Accepted(list(range(count)), scores.argmax()[count])
