"""A suffix automaton that grows token by token: the longest match of a text's end inside a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SEPARATOR = -1
"""Stands between sequences of one automaton; no token of a model's vocabulary."""

PLACES = 16
"""Places remembered per state, the latest ones."""

REFRESHED_LINKS = 32
"""Shorter matches whose places a new token refreshes. Texts have chains of some ten; only runs of one token are
longer, where an older place is as good as a newer one."""


@dataclass(frozen=True)
class Match:
    """The ``length`` last tokens stand in ``text`` too; ``places``: where what followed them begins, latest first.

    loops: whether a continuation that reaches the end of ``text`` goes on from its own beginning
    """

    length: int
    text: list[int]
    places: list[int]
    loops: bool = False


class AutomatonIndex:
    """Matches in the sequence itself and in a memory of other sequences; the longer one wins, the sequence's own on a
    tie (SAM-Decoding's dynamic and static automaton; SuffixDecoding's tree per request and tree of outputs).

    remember_outputs: every sequence's output enters the memory once a prompt comes that does not continue its
        conversation. Until then it stays out, and of several outputs for one prompt only the first enters: measuring
        the same prompt twice must not find its own answer.
    """

    def __init__(self, remember_outputs: bool = False) -> None:
        self._remember_outputs = remember_outputs
        self._memory = SuffixAutomaton()
        self._own = SuffixAutomaton()
        self._cursor = (0, 0)
        self._prompt: tuple[int, ...] = ()
        self._waiting: dict[tuple[int, ...], list[int]] = {}

    def memorize(self, tokens: Iterable[int]) -> None:
        """Enter a text that matches may come from in all sequences."""
        self._memory.extend([*tokens, SEPARATOR])

    def begin(self, prompt: list[int]) -> None:
        if self._remember_outputs:
            self._finish_sequence(tuple(prompt))
        self._own = SuffixAutomaton()
        self._cursor = (0, 0)
        self.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        """Learn the tokens that the sequence has beyond those it had."""
        for token in tokens[len(self._own.tokens) :]:
            self._own.append(token)
            if self._memory.tokens:
                self._cursor = self._memory.step(*self._cursor, token)

    def match(self) -> Match:
        own, remembered = self._own.own_match(), self._memory.match(*self._cursor)
        return remembered if remembered.length > own.length else own

    def _finish_sequence(self, prompt: tuple[int, ...]) -> None:
        output = self._own.tokens[len(self._prompt) :]
        if output:
            self._waiting.setdefault(self._prompt, output)
        if not any(_continues(prompt, earlier) for earlier in self._waiting):
            for finished in self._waiting.values():
                self.memorize(finished)
            self._waiting.clear()
        self._prompt = prompt


class SuffixAutomaton:
    """All substrings of a growing token sequence (Blumer et al. 1985), as in SAM-Decoding (Hu et al. 2024).

    `append` takes amortized constant time; the automaton has at most two states per token. A state stands for the
    substrings that end at the same places; its link leads to their longest suffix that also ends elsewhere.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._ends: list[list[int]] = [[]]
        self._last = 0
        self._seen: list[int] = []

    def append(self, token: int) -> None:
        self.tokens.append(token)
        end = len(self.tokens)
        current = self._state(self._length[self._last] + 1, {}, 0, [end])
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = current
            state = self._link[state]
        if state != -1:
            self._link[current] = self._longest_within(state, token)
        self._last = current
        # Read before this occurrence enters: a match is somewhere else.
        self._seen = list(self._ends[self._link[current]])
        self._refresh(self._link[current], end)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.append(token)

    def own_match(self) -> Match:
        """The longest end of the sequence itself that occurred in it before."""
        return Match(self._length[self._link[self._last]] if self._last else 0, self.tokens, self._seen[::-1], True)

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Follow another text: state and length of its longest end inside this sequence, after one more token.

        Begin with (0, 0). Takes amortized constant time.
        """
        while state and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state]
        following = self._next[state].get(token)
        return (0, 0) if following is None else (following, length + 1)

    def match(self, state: int, length: int) -> Match:
        """The match that `step` has reached."""
        return Match(length, self.tokens, self._ends[state][::-1] if state else [])

    def _state(self, length: int, following: dict[int, int], link: int, ends: list[int]) -> int:
        self._length.append(length)
        self._next.append(following)
        self._link.append(link)
        self._ends.append(ends)
        return len(self._length) - 1

    def _longest_within(self, state: int, token: int) -> int:
        """The state of ``state``'s longest substring followed by ``token``, split off where others share its state."""
        target = self._next[state][token]
        if self._length[target] == self._length[state] + 1:
            return target
        clone = self._state(
            self._length[state] + 1, self._next[target].copy(), self._link[target], self._ends[target].copy()
        )
        self._link[target] = clone
        while state != -1 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _refresh(self, state: int, end: int) -> None:
        for _ in range(REFRESHED_LINKS):
            if state <= 0:
                return
            ends = self._ends[state]
            ends.append(end)
            if len(ends) > PLACES:
                del ends[0]
            state = self._link[state]


def _continues(prompt: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the two are turns of one conversation, in either order."""
    shared = min(len(prompt), len(other))
    return prompt[:shared] == other[:shared]
