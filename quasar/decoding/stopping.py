"""Where a sequence ends: its length, the context window, stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quasar.decoding.draft import Context

# Tokens in front of a stop string that are decoded with it: some tokenizers treat the first one of a text differently.
LEAD = 8


class StopStrings:
    """Texts that end the output with the token that completes one of them.

    decode: token ids to text. A token holds at least one byte, so that only as many tokens as the longest text has
        bytes need to be decoded at a time: ``reach``, with the lead.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.texts = tuple(texts)
        self._decode = decode
        self.reach = max(len(text.encode()) for text in texts) + LEAD

    def completed_by_last(self, tokens: list[int]) -> bool:
        """Whether one of the texts stands in the output ``tokens``; no shorter output may have held it."""
        tail = self._decode(tokens[-self.reach :])
        return any(text in tail for text in self.texts)


@dataclass(frozen=True)
class Limits:
    """Where a sequence ends: after ``max_new_tokens``, at a stop token or string, or when the context is full.

    draft_tokens: cap on a draft's depth, or None to leave it to the drafter.
    """

    max_new_tokens: int
    context_length: int
    stop_tokens: frozenset[int]
    draft_tokens: int | None = None
    stop_strings: StopStrings | None = None

    def room(self, context: Context) -> int:
        """Tokens that may still be emitted."""
        emitted = len(context.tokens) - context.prompt_length
        return min(self.max_new_tokens - emitted, self.context_length - len(context.tokens))

    def budget(self, context: Context) -> int:
        """Deepest useful draft: the bonus token takes one place of the room."""
        budget = self.room(context) - 1
        return budget if self.draft_tokens is None else min(budget, self.draft_tokens)

    def cut(self, context: Context, emitted: list[int]) -> list[int]:
        """The part of a step's tokens up to the first one that ends the output, and within its room."""
        emitted = emitted[: self.room(context)]
        output = self._tail(context)
        for index, token in enumerate(emitted):
            output.append(token)
            if self._stops(output):
                return emitted[: index + 1]
        return emitted

    def finished(self, context: Context) -> str | None:
        """Why the sequence is over ("stop", "length", "context"), or None."""
        if self._stops(self._tail(context)):
            return "stop"
        if self.room(context) > 0:
            return None
        return "length" if len(context.tokens) - context.prompt_length >= self.max_new_tokens else "context"

    def _tail(self, context: Context) -> list[int]:
        """The last tokens of the output, as many as decide whether it ends: no step copies all of it."""
        reach = 1 if self.stop_strings is None else self.stop_strings.reach
        return context.tokens[max(context.prompt_length, len(context.tokens) - reach) :]

    def _stops(self, output: list[int]) -> bool:
        if output[-1] in self.stop_tokens:
            return True
        return self.stop_strings is not None and self.stop_strings.completed_by_last(output)
