"""Sources of likely next tokens after a context, for the mixture drafter."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

LAST_PLACE = 3
"""Later places of a list count as this one, because few tokens are tried there."""
MOST_CONTEXTS = 1 << 16
"""Contexts that a source remembers, those that were seen most recently. Each takes up to about 400 bytes."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Why a source suggests a token. There is one object for each kind, so that it is quick to compare.

    key: equal for evidence of one kind
    odds: assumed odds that the token is right, if no other source suggests it
    gain: assumed factor on the odds that another source gives
    """

    key: tuple[str | int, ...]
    odds: float
    gain: float


class NextTokens:
    """A source: it learns from the sequence or from the verifier's logits and suggests next tokens.

    A source remembers a list of tokens, the best first, after the last n tokens for every order n.

    order: the largest n
    most: tokens that are remembered per context
    """

    name: str

    def __init__(self, order: int, most: int) -> None:
        self._order, self._most = order, most
        self._known: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()

    def clear(self) -> None:
        self._known.clear()

    def read(self, tokens: Sequence[int], first: int) -> None:
        """Learn from the sequence so far, of which the tokens from index ``first`` on are new."""

    def score(self, context: tuple[int, ...], likely: list[int]) -> None:
        """Learn from a row of a pass: the verifier's most likely tokens after a context, the best first."""

    def suggest(self, context: tuple[int, ...]) -> dict[int, Evidence]:
        """Return the tokens known after the last n tokens of a context, each with the evidence of the largest n."""
        found: dict[int, Evidence] = {}
        for size in range(min(self._order, len(context)), 0, -1):
            known = self._known.get(context[-size:])
            if known is not None:
                alone = len(known) == 1
                for place, token in enumerate(known):
                    if token not in found:
                        found[token] = _evidence(self.name, size, place, alone)
        return found

    def _remember(self, context: tuple[int, ...], tokens: list[int]) -> None:
        self._known[context] = tokens[: self._most]
        self._known.move_to_end(context)
        if len(self._known) > MOST_CONTEXTS:
            self._known.popitem(last=False)


class TextTokens(NextTokens):
    """The tokens that followed earlier occurrences of the last n tokens in the prompt or the output, latest first."""

    name = "text"

    def read(self, tokens: Sequence[int], first: int) -> None:
        for position in range(max(first, 1), len(tokens)):
            for size in range(1, min(self._order, position) + 1):
                context, token = tuple(tokens[position - size : position]), tokens[position]
                others = [other for other in self._known.get(context, []) if other != token]
                self._remember(context, [token, *others])


class LogitTokens(NextTokens):
    """The verifier's most likely tokens in the last pass with a row after the same n tokens, rejected rows included."""

    name = "logits"

    def score(self, context: tuple[int, ...], likely: list[int]) -> None:
        for size in range(1, min(self._order, len(context)) + 1):
            self._remember(context[-size:], likely)


class RunnersUp(NextTokens):
    """The tokens that were likely in place of the last one, of which some come right after it, as in LogitSpec.

    They are those of the last row of the accepted path. They follow its own context and the argmax, which was emitted.
    """

    name = "runners_up"

    def score(self, context: tuple[int, ...], likely: list[int]) -> None:
        self._known.clear()
        self._known[(*context, likely[0])[-self._order :]] = likely[1:]

    def suggest(self, context: tuple[int, ...]) -> dict[int, Evidence]:
        known = self._known.get(context, [])
        return {token: _evidence(self.name, 0, place, False) for place, token in enumerate(known)}


SOURCES: dict[str, type[NextTokens]] = {source.name: source for source in (TextTokens, LogitTokens, RunnersUp)}


@functools.cache
def _evidence(name: str, size: int, place: int, alone: bool) -> Evidence:
    """Return the evidence of a source for the token at a place of its list.

    size: n, how many tokens of the context the list belongs to
    alone: whether the list has one token

    The assumed rates describe recorded answers of SmolLM2-135M. A token that came next at every earlier occurrence of
    n = 1 to 4 tokens is right in 0.35 to 0.8 of the cases; if there were several tokens, the latest one in half of them
    at most. The verifier's second choice of then is right in 0.08, its argmax of then is already what the text says.
    """
    if name == RunnersUp.name:
        return Evidence((name, min(place, 1)), _odds(0.03 / (1 + place)), 4.0 if place == 0 else 1.5)
    longer = 1 - 0.65**size
    kept = min(place, LAST_PLACE)
    if name == LogitTokens.name:
        rate = longer if place == 0 else 0.25 * (place + 1) ** -1.7
        return Evidence((name, size, kept), _odds(rate), 1.0 if place == 0 else 3.0)
    rate = longer if alone else 0.4 * longer * (place + 1) ** -1.5
    return Evidence((name, size, kept, alone), _odds(rate), 1.0)


def _odds(rate: float) -> float:
    return rate / (1 - rate)
