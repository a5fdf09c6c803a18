"""The initial size of the KV caches of a run."""

from __future__ import annotations

from collections.abc import Iterable

from quasar.errors import RequestError
from quasar.evaluation.prompts import Prompt
from quasar.model.tokenizer import Tokenizer

BLOCK_ROOM = 64
"""Rows of a verification pass that the initial KV cache has room for."""


def cache_capacity(prompts: Iterable[Prompt], max_new_tokens: int, tokenizer: Tokenizer, context_length: int) -> int:
    """Return the tokens of the longest prompt, its answer and a verification pass.

    Raises RequestError if a prompt does not fit the context window.
    """
    longest = _longest(prompts, tokenizer, context_length)
    return min(longest + max_new_tokens, context_length) + BLOCK_ROOM


def _longest(prompts: Iterable[Prompt], tokenizer: Tokenizer, context_length: int) -> int:
    """Return the tokens of the longest prompt, all turns together. Raises RequestError if a prompt is too long."""
    longest = 0
    for prompt in prompts:
        length = len(tokenizer.encode_chat([{"role": "user", "content": "\n".join(prompt.turns)}]))
        if length >= context_length:
            raise RequestError(
                f"{prompt.place}: question {prompt.key} has {length} tokens, but the model's context window is "
                f"{context_length}; shorten it or leave it out"
            )
        longest = max(longest, length)
    return longest
