"""Prompt lookup: what followed the last few tokens when they occurred before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, validate_call
from torch import Tensor

from quasar.decoding.draft import Context, Draft, merge_into_tree
from quasar.drafters._suffix_automaton import SEPARATOR, AutomatonIndex, Match
from quasar.drafters.base import Drafter, Resources
from quasar.errors import RequestError

# Places of an n-gram that lookup remembers, the latest ones: they bound the cost of a step.
LOOKUP_PLACES = 64


class NgramDrafter(Drafter):
    """Prompt lookup decoding (Saxena 2023): a suffix of the context that occurred before, in prompt or output, offers
    the tokens that followed it there.

    num_tokens: tokens per draft, at most
    method:  lookup: the longest suffix of n_max down to n_min tokens. One dictionary lookup per n and step, n_max
             insertions per new token. suffix_automaton: the longest suffix of any length from n_min on (SAM-Decoding,
             Hu et al. 2024; SuffixDecoding, Oliaro et al. 2024), amortized constant time per new token. No model pass.
    match:   of several places, recent: the latest that has a full continuation, or else the longest continuation;
             frequent: token by token what followed most often, the latest where that is a tie
    branches: so many different continuations, merged into a tree
    scope:   where suffix_automaton looks besides prompt and output. session: earlier outputs of the run; corpus: the
             text file ``corpus``, whose automaton takes some 10 µs and 1 kB per token
    length_factor: suffix_automaton drafts at most so many tokens per matched token, and at most ``num_tokens``
    """

    @validate_call
    def __init__(
        self,
        num_tokens: PositiveInt = 5,
        method: Literal["lookup", "suffix_automaton"] = "lookup",
        match: Literal["recent", "frequent"] = "recent",
        n_max: PositiveInt = 3,
        n_min: PositiveInt = 1,
        branches: PositiveInt = 1,
        scope: Literal["prompt", "session", "corpus"] = "prompt",
        corpus: str | None = None,
        length_factor: Annotated[float, Field(gt=0)] | None = 2.0,
    ) -> None:
        if method == "lookup" and n_min > n_max:
            raise RequestError(
                f"drafter.n_min={n_min} is larger than drafter.n_max={n_max}; lower one or raise the other"
            )
        if method == "lookup" and scope != "prompt":
            raise RequestError(f"drafter.scope={scope} needs drafter.method=suffix_automaton")
        if (scope == "corpus") != (corpus is not None):
            raise RequestError(
                f"drafter.scope={scope} with drafter.corpus={corpus}: scope=corpus and a text file belong together"
            )
        self.num_tokens, self.match, self.branches = num_tokens, match, branches
        self.n_min, self.corpus = n_min, corpus
        self.length_factor = None if method == "lookup" else length_factor
        self._index: AutomatonIndex | LookupIndex
        if method == "lookup":
            self._index = LookupIndex(range(n_max, n_min - 1, -1))
        else:
            self._index = AutomatonIndex(remember_outputs=scope == "session")

    def prepare(self, resources: Resources) -> None:
        """Read the corpus. Raises RequestError where it is no text file."""
        if self.corpus is not None and isinstance(self._index, AutomatonIndex):
            try:
                text = Path(self.corpus).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(f"drafter.corpus={self.corpus}: not a readable text file ({error})") from None
            tokens = resources.encode(text)
            self._index.memorize(tokens)
            self.details = (f"corpus of {len(tokens)} tokens",)

    def begin(self, prompt: Tensor) -> None:
        self._index.begin(prompt.tolist())

    def propose(self, context: Context, budget: int) -> Draft:
        self._index.extend(context.tokens)
        match = self._index.match()
        if match.length < self.n_min:
            return Draft()
        length = min(self.num_tokens, budget)
        if self.length_factor is not None:
            length = min(length, max(1, int(self.length_factor * match.length)))
        return Draft(*merge_into_tree(self._continuations(match, length)))

    def _continuations(self, match: Match, length: int) -> list[tuple[int, ...]]:
        """Up to ``branches`` continuations of at most ``length`` tokens, none the beginning of an earlier one."""
        found = [path for place in match.places if (path := _follow(match, place, length))]
        # Sorting is stable: among equally long continuations the latest stays first.
        found.sort(key=len, reverse=True)
        chosen: list[tuple[int, ...]] = []
        while found and len(chosen) < self.branches:
            chosen.append(found[0] if self.match == "recent" else most_frequent(found))
            found = [path for path in found if path != chosen[-1][: len(path)]]
        return chosen


class LookupIndex:
    """Where the follower of every n-gram of the sequence stands, for n in ``sizes``, the preferred first."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], list[int]] = {}

    def begin(self, prompt: list[int]) -> None:
        self._followers.clear()
        self._tokens = []
        self.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        """Learn the tokens that the sequence has beyond those it had."""
        for position in range(max(len(self._tokens), 1), len(tokens)):
            for size in self._sizes:
                if size <= position:
                    key = tuple(tokens[position - size : position])
                    places = self._followers.setdefault(key, [])
                    places.append(position)
                    if len(places) > LOOKUP_PLACES:
                        del places[0]
        self._tokens += tokens[len(self._tokens) :]

    def match(self) -> Match:
        for size in self._sizes:
            places = self._followers.get(tuple(self._tokens[-size:]))
            if places is not None and size < len(self._tokens):
                return Match(size, self._tokens, places[::-1])
        return Match(0, self._tokens, [])


def most_frequent(paths: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Token by token what most of the paths that agree so far go on with; the first such path's token on a tie."""
    path: tuple[int, ...] = ()
    while paths:
        counts = Counter(candidate[len(path)] for candidate in paths)
        path = (*path, max(counts, key=counts.__getitem__))
        paths = [candidate for candidate in paths if len(candidate) > len(path) and candidate[: len(path)] == path]
    return path


def _follow(match: Match, place: int, length: int) -> tuple[int, ...]:
    path = match.text[place : place + length]
    if SEPARATOR in path:
        return tuple(path[: path.index(SEPARATOR)])
    if match.loops and path:
        path = (path * -(-length // len(path)))[:length]
    return tuple(path)
