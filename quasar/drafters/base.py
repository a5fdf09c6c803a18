"""The drafter's seam."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from quasar.acceptance import AcceptanceRule
from quasar.draft import Context, Draft, StepResult
from quasar.verifiers.base import Verifier


class Drafter(Protocol):
    def begin(self, prompt: Tensor, verifier: Verifier) -> None:
        """A new sequence starts; the verifier has just read the prompt, int64 [P]."""
        ...

    def propose(self, context: Context, budget: int) -> Draft:
        """A draft at most ``budget`` tokens deep (0 or more) for the current context; an empty one is fine."""
        ...

    def observe(self, step: StepResult) -> None:
        """What became of the last draft; ``step.emitted`` is already part of the context."""
        ...


@runtime_checkable
class SimulatingDrafter(Protocol):
    """A drafter that also decides what is accepted: the times of its steps are real, its text is not."""

    @property
    def rule(self) -> AcceptanceRule: ...
