"""Stop criteria: maximum length, context window, stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quasar.decoding.draft import Context

# This many tokens before a stop string are decoded with it, because some tokenizers decode the first token of a text
# differently.
LEAD = 8


class StopStrings:
    """Texts that end the output. The output ends with the token that completes one of them.

    decode: converts token ids to text, without special tokens
    spell: converts token ids to text in which special tokens are spelled, so that ``<end>`` can be a stop string; by
        default ``decode``
    reach: number of tokens to decode at a time. A token has at least one byte, so the bytes of the longest text plus
        `LEAD` are enough
    """

    def __init__(
        self,
        texts: Sequence[str],
        decode: Callable[[list[int]], str],
        spell: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.texts = tuple(texts)
        self._spellings = (decode,) if spell is None else (decode, spell)
        self.reach = max(len(text.encode(errors="replace")) for text in texts) + LEAD

    def completed_by_last(self, tokens: list[int]) -> bool:
        """Whether the last token of the output completes a stop string. The output must not contain an earlier one."""
        tails = [spelled(tokens[-self.reach :]) for spelled in self._spellings]
        return any(text in tail for text in self.texts for tail in tails)


@dataclass(frozen=True)
class Limits:
    """The stop criteria: ``max_new_tokens``, a stop token or stop string, or a full context window.

    draft_tokens: maximum depth of a draft, or None if the drafter decides
    """

    max_new_tokens: int
    context_length: int
    stop_tokens: frozenset[int]
    draft_tokens: int | None = None
    stop_strings: StopStrings | None = None

    def room(self, context: Context) -> int:
        """Return how many tokens may still be emitted."""
        emitted = len(context.tokens) - context.prompt_length
        return min(self.max_new_tokens - emitted, self.context_length - len(context.tokens))

    def budget(self, context: Context) -> int:
        """Return the draft budget, the maximum depth of a draft. One token of the room is left for the bonus token."""
        budget = self.room(context) - 1
        return budget if self.draft_tokens is None else min(budget, self.draft_tokens)

    def cut(self, context: Context, emitted: list[int]) -> list[int]:
        """Return the tokens of a step that fit the room, up to and including the first one that ends the output."""
        emitted = emitted[: self.room(context)]
        output = self._tail(context)
        for index, token in enumerate(emitted):
            output.append(token)
            if self._stops(output):
                return emitted[: index + 1]
        return emitted

    def finished(self, context: Context) -> str | None:
        """Return why the sequence has ended ("stop", "length" or "context"), or None if it has not."""
        if self._stops(self._tail(context)):
            return "stop"
        if self.room(context) > 0:
            return None
        return "length" if len(context.tokens) - context.prompt_length >= self.max_new_tokens else "context"

    def _tail(self, context: Context) -> list[int]:
        """Return only the last tokens of the output that the stop criteria need, so that no step copies all of them."""
        reach = 1 if self.stop_strings is None else self.stop_strings.reach
        return context.tokens[max(context.prompt_length, len(context.tokens) - reach) :]

    def _stops(self, output: list[int]) -> bool:
        if output[-1] in self.stop_tokens:
            return True
        return self.stop_strings is not None and self.stop_strings.completed_by_last(output)
