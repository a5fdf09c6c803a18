"""No drafting: autoregressive decoding in the same loop. It is the baseline of every speedup."""

from quasar.decoding.draft import Context, Draft
from quasar.drafters.base import Drafter


class NoneDrafter(Drafter):
    """Proposes nothing. Every step emits only the bonus token, so τ = 1."""

    @property
    def chooses_size(self) -> bool:
        return True

    def propose(self, context: Context, budget: int) -> Draft:
        return Draft()
