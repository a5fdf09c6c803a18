"""No drafting: plain autoregressive decoding through the same loop, the baseline of every speedup."""

from quasar.decoding.draft import Context, Draft
from quasar.drafters.base import Drafter


class NoneDrafter(Drafter):
    """Proposes nothing; every step emits the bonus token alone, τ = 1."""

    def propose(self, context: Context, budget: int) -> Draft:
        return Draft()
