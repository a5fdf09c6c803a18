"""A drafter in one file: it guesses that the last token comes again."""

from __future__ import annotations

from pydantic import PositiveInt, validate_call

from quasar.decoding.draft import Context, Draft
from quasar.drafters.base import Drafter


class RepeatDrafter(Drafter):
    """Guess that the last token comes again, ``num_tokens`` times.

    Example with num_tokens = 3: after "a b" the draft is "b b b".
    """

    @validate_call
    def __init__(self, num_tokens: PositiveInt = 2) -> None:
        self.num_tokens = num_tokens

    def propose(self, context: Context, budget: int) -> Draft:
        return Draft.chain([context.last] * min(self.num_tokens, budget))
