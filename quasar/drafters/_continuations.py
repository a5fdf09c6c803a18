"""What followed earlier occurrences of the last tokens, as paths or as a tree with frequencies."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

from quasar.decoding.draft import ROOT

SEPARATOR = -1
"""Separates the sequences of one text. It is not in any model's vocabulary."""


@dataclass(frozen=True)
class Match:
    """The last ``length`` tokens of the context also occur in ``text``.

    places: indices in ``text`` of the tokens after these occurrences, latest first
    loops: whether a continuation that reaches the end of ``text`` starts again from its beginning
    """

    length: int
    text: list[int]
    places: list[int]
    loops: bool = False

    def token(self, place: int, depth: int) -> int:
        """Return the token ``depth`` tokens after ``place``, or ``SEPARATOR`` where the sequence has ended."""
        left = len(self.text) - place
        if depth < left:
            return self.text[place + depth]
        return self.text[place + depth % left] if self.loops and left else SEPARATOR


def continuations(match: Match, length: int, frequent: bool, branches: int) -> list[tuple[int, ...]]:
    """Return up to ``branches`` continuations of at most ``length`` tokens; none is a prefix of an earlier one.

    frequent: prefer the most frequent continuation, token by token, and the latest one on a tie. Otherwise prefer the
        latest place with a full continuation, or else the longest continuation
    """
    found = [path for place in match.places if (path := follow(match, place, length))]
    # Sorting is stable: among equally long continuations the latest stays first.
    found.sort(key=len, reverse=True)
    chosen: list[tuple[int, ...]] = []
    while found and len(chosen) < branches:
        chosen.append(most_frequent(found) if frequent else found[0])
        found = [path for path in found if path != chosen[-1][: len(path)]]
    return chosen


def follow(match: Match, place: int, length: int) -> tuple[int, ...]:
    """Return at most ``length`` tokens from ``place`` on."""
    path = match.text[place : place + length]
    if SEPARATOR in path:
        return tuple(path[: path.index(SEPARATOR)])
    if match.loops and path:
        path = (path * -(-length // len(path)))[:length]
    return tuple(path)


def most_frequent(paths: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the path that follows, token by token, the majority of the paths that agree with it so far.

    On a tie it takes the token of the path that comes first.
    """
    path: tuple[int, ...] = ()
    while paths:
        counts = Counter(candidate[len(path)] for candidate in paths)
        path = (*path, max(counts, key=counts.__getitem__))
        paths = [candidate for candidate in paths if len(candidate) > len(path) and candidate[: len(path)] == path]
    return path


@dataclass(frozen=True)
class ScoredTree:
    """A draft tree and its score, the sum of its tokens' estimated probabilities: the expected accepted tokens."""

    tokens: list[int]
    parents: list[int]
    score: float


def scored_tree(match: Match, size: int, deepest: int, least: float) -> ScoredTree:
    """Return the tree of the most probable continuations (SuffixDecoding, Oliaro et al. 2024, section 3.2).

    The probability of a token is that of its parent times its share among what followed the parent. Beginning with the
    root, the most probable token whose parent is in the tree is added until the tree has ``size`` tokens. On a tie the
    child of the token that was added first comes first, and among siblings the one of the latest place.

    Example: after four occurrences came "a b", "a c", "a b" and "d". With size 3, the tree is a (3/4), then b below a
    (3/4 * 2/3 = 1/2), and d (1/4) before c below a (1/4). The score is 1.5.

    size: most tokens of the tree
    deepest: most tokens of a path
    least: tokens with a lower probability are left out
    """
    tokens: list[int] = []
    parents: list[int] = []
    score, added = 0.0, 0
    # A candidate is (-probability, order, parent, depth, its places); the order decides ties.
    candidates: list[tuple[float, int, int, int, list[int]]] = []

    def add_children(probability: float, parent: int, depth: int, places: list[int]) -> None:
        nonlocal added
        if depth >= deepest:
            return
        following: dict[int, list[int]] = {}
        for place in places:
            following.setdefault(match.token(place, depth), []).append(place)
        following.pop(SEPARATOR, None)
        for same in following.values():
            share = probability * len(same) / len(places)
            if share >= least:
                heapq.heappush(candidates, (-share, added, parent, depth, same))
                added += 1

    add_children(1.0, ROOT, 0, match.places)
    while candidates and len(tokens) < size:
        negative, _, parent, depth, places = heapq.heappop(candidates)
        tokens.append(match.token(places[0], depth))
        parents.append(parent)
        score -= negative
        add_children(-negative, len(tokens) - 1, depth + 1, places)
    return ScoredTree(tokens, parents, score)
