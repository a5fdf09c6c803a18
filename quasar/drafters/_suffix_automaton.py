"""A suffix automaton that grows token by token and finds the longest suffix of a text that occurs in a text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from quasar.drafters._continuations import SEPARATOR, Match

PLACES = 16
"""Number of places kept per state; only the latest ones are kept."""

REFRESHED_LINKS = 32
"""Number of suffix links along which a new token updates the places of shorter matches. Usual texts need about ten.
Only repetitions of a single token need more, and there an older place is as good as a newer one."""

MATCH_LENGTHS = 4
"""Number of different matches in one text that `AutomatonIndex.matches` returns."""

REMOVABLE = 64
"""Number of last tokens that can be removed again without building the automaton anew."""


class AutomatonIndex:
    """Finds matches in the current sequence and in a memory of other sequences.

    The longer match is used, and the one in the current sequence if both are equally long. These are the dynamic and
    the static automaton of SAM-Decoding, or the request tree and the output tree of SuffixDecoding.

    remember_outputs: whether the output of every sequence is added to the memory. It is added when a prompt comes that
        does not continue its conversation. Only the first of several outputs for the same prompt is added, so that a
        prompt that is decoded twice does not find its own answer
    """

    def __init__(self, remember_outputs: bool = False) -> None:
        self._remember_outputs = remember_outputs
        self._memory = SuffixAutomaton()
        self._own = SuffixAutomaton()
        self._cursors = [(0, 0)]
        self._prompt: tuple[int, ...] = ()
        self._waiting: dict[tuple[int, ...], list[int]] = {}

    def memorize(self, tokens: Iterable[int]) -> None:
        """Add a text to the memory, which all sequences are matched against."""
        self._memory.extend([*tokens, SEPARATOR])

    def start(self, finished: Iterable[tuple[list[int], list[int]]]) -> None:
        """Replace the remembered outputs by those of other sequences, given their (prompt, output) in order.

        Without ``remember_outputs`` this does nothing: a text that was given to `memorize` stays.
        """
        if not self._remember_outputs:
            return
        self._memory, self._own, self._prompt = SuffixAutomaton(), SuffixAutomaton(), ()
        self._waiting.clear()
        for prompt, output in finished:
            self.begin(prompt)
            self.extend(prompt + output)

    def begin(self, prompt: list[int]) -> None:
        if self._remember_outputs:
            self._finish_sequence(tuple(prompt))
        self._own = SuffixAutomaton()
        self._cursors = [(0, 0)]
        self.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        """Add the new tokens of the sequence, which are those after the known ones."""
        for token in tokens[len(self._own.tokens) :]:
            self._own.append(token)
            known = self._memory.tokens
            self._cursors.append(self._memory.step(*self._cursors[-1], token) if known else (0, 0))

    def rewind(self, length: int) -> None:
        """Remove all tokens of the sequence behind the first ``length``."""
        self._own = self._own.first(length)
        del self._cursors[length + 1 :]

    def match(self) -> Match:
        own, remembered = self._own.own_match(), self._memory.match(*self._cursors[-1])
        return remembered if remembered.length > own.length else own

    def matches(self) -> list[Match]:
        """Return the longest match and shorter ones that occur at more places, in both texts, the longest first."""
        found = [*self._own.own_matches(), *self._memory.matches(*self._cursors[-1])]
        # Sorting is stable: the match in the current sequence stays first among equally long ones.
        return sorted(found, key=lambda match: -match.length)

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
    """An automaton of all substrings of a growing token sequence (Blumer et al. 1985; SAM-Decoding, Hu et al. 2024).

    `append` takes amortized constant time, and the automaton has at most two states per token. A state represents all
    substrings that end at the same places. Its link points to the state of their longest suffix that also ends at other
    places.

    Example: in the sequence a b c a b, the suffix "a b" occurred before, followed by c, so `own_match` has length 2 and
    the place 2.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._ends: list[list[int]] = [[]]
        self._last = 0
        self._seen: list[int] = []
        self._changes: deque[_Change] = deque(maxlen=REMOVABLE)

    def append(self, token: int) -> None:
        change = _Change(token, self._last, self._seen, len(self._next))
        self._changes.append(change)
        self.tokens.append(token)
        end = len(self.tokens)
        current = self._state(self._length[self._last] + 1, {}, 0, [end])
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = current
            change.entered.append(state)
            state = self._link[state]
        if state != -1:
            self._link[current] = self._longest_within(state, token, change)
        self._last = current
        # The places are copied before this occurrence is added, because a match must be an earlier occurrence.
        self._seen = list(self._ends[self._link[current]])
        self._refresh(self._link[current], end, change)

    def first(self, length: int) -> SuffixAutomaton:
        """Return the automaton of the first ``length`` tokens: this one, without the tokens behind them.

        If more than `REMOVABLE` tokens must be removed, it is a new one.
        """
        surplus = len(self.tokens) - length
        if surplus > len(self._changes):
            other = SuffixAutomaton()
            other.extend(self.tokens[:length])
            return other
        for _ in range(surplus):
            self._undo(self._changes.pop())
        return self

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.append(token)

    def own_match(self) -> Match:
        """Return the longest suffix of the sequence that occurred in it before."""
        return Match(self._length[self._link[self._last]] if self._last else 0, self.tokens, self._seen[::-1], True)

    def own_matches(self) -> list[Match]:
        """Return the longest suffixes of the sequence that occurred in it before, at most `MATCH_LENGTHS`."""
        end = len(self.tokens)
        found = [self.own_match()] if self._seen else []
        shorter = self._shorter(self._link[self._last]) if found else iter(())
        for state in islice(shorter, MATCH_LENGTHS - 1):
            earlier = [place for place in reversed(self._ends[state]) if place < end]
            found.append(Match(self._length[state], self.tokens, earlier, True))
        return found

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Add one token of another text; return state and length of its longest suffix that occurs in this sequence.

        The first call takes state and length (0, 0). A call takes amortized constant time.
        """
        while state and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state]
        following = self._next[state].get(token)
        return (0, 0) if following is None else (following, length + 1)

    def match(self, state: int, length: int) -> Match:
        """Return the match for a state and length that `step` has returned."""
        return Match(length, self.tokens, self._ends[state][::-1] if state else [])

    def matches(self, state: int, length: int) -> list[Match]:
        """Return the match for a state and length that `step` has returned, and shorter ones, like `own_matches`."""
        if not state:
            return []
        shorter = islice(self._shorter(state), MATCH_LENGTHS - 1)
        return [self.match(state, length), *(self.match(other, self._length[other]) for other in shorter)]

    def _shorter(self, state: int) -> Iterator[int]:
        """Yield the states of the suffixes that occur at more places than ``state``, the longest first."""
        while (state := self._link[state]) > 0:
            yield state

    def _state(self, length: int, following: dict[int, int], link: int, ends: list[int]) -> int:
        self._length.append(length)
        self._next.append(following)
        self._link.append(link)
        self._ends.append(ends)
        return len(self._length) - 1

    def _undo(self, change: _Change) -> None:
        """Undo the last `append`, in the opposite order."""
        for state, forgotten in reversed(change.refreshed):
            self._ends[state].pop()
            if forgotten is not None:
                self._ends[state].insert(0, forgotten)
        if change.redirected:
            clone = change.states + 1
            target = change.split
            self._link[target] = self._link[clone]
            for state in change.redirected:
                self._next[state][change.token] = target
        for state in change.entered:
            del self._next[state][change.token]
        for states in (self._length, self._next, self._link, self._ends):
            del states[change.states :]
        self._last, self._seen = change.last, change.seen
        self.tokens.pop()

    def _longest_within(self, state: int, token: int, change: _Change) -> int:
        """Return the state of ``state``'s longest substring followed by ``token``.

        If longer substrings share that state, it is split.
        """
        target = self._next[state][token]
        if self._length[target] == self._length[state] + 1:
            return target
        clone = self._state(
            self._length[state] + 1, self._next[target].copy(), self._link[target], self._ends[target].copy()
        )
        self._link[target] = clone
        change.split = target
        while state != -1 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            change.redirected.append(state)
            state = self._link[state]
        return clone

    def _refresh(self, state: int, end: int, change: _Change) -> None:
        for _ in range(REFRESHED_LINKS):
            if state <= 0:
                return
            ends = self._ends[state]
            ends.append(end)
            change.refreshed.append((state, ends.pop(0) if len(ends) > PLACES else None))
            state = self._link[state]


@dataclass
class _Change:
    """What `SuffixAutomaton.append` changed.

    last, seen: the values before
    states:     number of states before; the new token's state comes first, then the clone if a state was split
    entered:    the states that got a transition with the token
    split, redirected: the state that was split, and the states whose transition with the token led to it
    refreshed:  the states that got a place, each with the place that it lost
    """

    token: int
    last: int
    seen: list[int]
    states: int
    entered: list[int] = field(default_factory=list)
    split: int = 0
    redirected: list[int] = field(default_factory=list)
    refreshed: list[tuple[int, int | None]] = field(default_factory=list)


def _continues(prompt: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the two are turns of one conversation, in either order."""
    shared = min(len(prompt), len(other))
    return prompt[:shared] == other[:shared]
