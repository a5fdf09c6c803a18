"""No drafting: plain autoregressive decoding through the same loop, the baseline of every speedup."""

from torch import Tensor

from quasar.decoding.draft import Context, Draft, StepResult
from quasar.verifiers.base import Verifier


class NoneDrafter:
    """Proposes nothing; every step emits the bonus token alone, τ = 1."""

    def begin(self, prompt: Tensor, verifier: Verifier) -> None:
        pass

    def propose(self, context: Context, budget: int) -> Draft:
        return Draft()

    def observe(self, step: StepResult) -> None:
        pass
