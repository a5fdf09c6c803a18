"""The initial size of the KV caches of a run."""

from __future__ import annotations

from collections.abc import Iterable

from quasar.config.schema import PassesConfig
from quasar.decoding.draft import MAX_ROWS
from quasar.errors import RequestError
from quasar.evaluation.prompts import Prompt
from quasar.model.tokenizer import Tokenizer


def cache_capacity(prompts: Iterable[Prompt], max_new_tokens: int, tokenizer: Tokenizer, context_length: int) -> int:
    """Return the tokens of the longest prompt, its answer and a verification pass.

    Raises RequestError if a prompt does not fit the context window.
    """
    longest = _longest(prompts, tokenizer, context_length)
    return min(longest + max_new_tokens, context_length) + MAX_ROWS


def timed_tokens(passes: PassesConfig, context_length: int) -> int:
    """Return the most tokens that timed passes read, their rows included; 0 if none are timed.

    The KV cache needs room for them, because it must not grow while passes are timed.

    Raises RequestError if no pass fits the context window.
    """
    if not passes.repetitions:
        return 0
    if passes.contexts[0] >= context_length:
        raise RequestError(
            f"evaluate.passes.contexts={passes.contexts}: none fits the model's context window of {context_length} "
            "tokens; choose smaller ones"
        )
    return min(passes.contexts[-1] + passes.rows[-1], context_length)


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
