"""Sources of likely next tokens after a context, for the mixture drafter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quasar.drafters._tree_size import Kind

MOST_CONTEXTS = 1 << 16
"""Contexts that a source remembers, those that were seen most recently. Each takes up to about 400 bytes."""


@dataclass(frozen=True)
class Suggestion:
    """A token that may come next, and the kind of guess it is, whose acceptance rate is estimated."""

    token: int
    kind: Kind


class NextTokens:
    """A source: it learns from the sequence or from the verifier's logits and suggests next tokens.

    A source remembers a list of tokens, the best first, after the last n tokens for every order n. A suggestion's kind
    is (name, n, place in the list).

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

    def suggest(self, context: tuple[int, ...]) -> Iterator[Suggestion]:
        """Yield the tokens known after the last tokens of a context, for the longest n first."""
        for size in range(min(self._order, len(context)), 0, -1):
            for place, token in enumerate(self._known.get(context[-size:], [])):
                yield Suggestion(token, Kind((self.name, size, place), _assumed_rate(size, place)))

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


SOURCES: dict[str, type[NextTokens]] = {source.name: source for source in (TextTokens, LogitTokens)}


def _assumed_rate(size: int, place: int) -> float:
    """Return the acceptance rate before there is evidence: 0.4 to 0.87 for 1 to 4 tokens, less for later places."""
    return float((1 - 0.6**size) * (place + 1) ** -1.5)
