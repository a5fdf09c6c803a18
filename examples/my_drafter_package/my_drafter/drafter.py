"""Drafts by the prompt lookup of transformers (`PromptLookupCandidateGenerator`)."""

from __future__ import annotations

import torch
from pydantic import PositiveInt, validate_call
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from quasar.decoding.draft import Context, Draft
from quasar.drafters.base import Drafter


class LookupDrafter(Drafter):
    """Guess what followed the last tokens where they occurred before: what `generate(prompt_lookup_num_tokens)` does.

    num_tokens: most tokens per draft; max_ngram: most tokens that have to match

    Example with num_tokens = 2: after "a b c a b" the draft is "c a".
    """

    @validate_call
    def __init__(self, num_tokens: PositiveInt = 5, max_ngram: PositiveInt = 3) -> None:
        self.num_tokens, self.max_ngram = num_tokens, max_ngram

    def propose(self, context: Context, budget: int) -> Draft:
        length = min(self.num_tokens, budget)
        if length < 1:
            return Draft()
        # The generator looks one token less far than its maximum length.
        limit = len(context.tokens) + length + 1
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=length, max_matching_ngram_size=self.max_ngram, max_length=limit
        )
        tokens = torch.tensor([context.tokens])
        candidates, _ = generator.get_candidates(tokens)
        return Draft.chain(candidates[0, tokens.shape[1] :].tolist()[:length])
