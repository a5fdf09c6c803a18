"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last few tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, validate_call
from torch import Tensor

from quasar.config.inputs import expanded, read_text
from quasar.decoding.draft import Context, Draft, merge_into_tree
from quasar.drafters._suffix_automaton import SEPARATOR, AutomatonIndex, Match
from quasar.drafters.base import Drafter, FinishedSequence, Resources
from quasar.errors import RequestError

# Number of latest places that lookup considers per n-gram. This bounds the cost of a step.
LOOKUP_PLACES = 64


class NgramDrafter(Drafter):
    """Prompt lookup decoding (Saxena 2023).

    It finds a suffix of the context that occurred before in the prompt or the output, and drafts the tokens that
    followed it there. It needs no model pass.

    Example with n_max = 3: the context is "the cat sat . the cat". The suffix "the cat" (n = 2) occurred before and was
    followed by "sat . the cat", which is the draft.

    num_tokens: maximum number of tokens per draft
    method:  lookup matches the longest suffix of n_max down to n_min tokens, with one dictionary lookup per n and step,
             and n_max insertions per new token. suffix_automaton matches the longest suffix of at least n_min tokens
             (SAM-Decoding, Hu et al. 2024; SuffixDecoding, Oliaro et al. 2024) in amortized constant time per new token
    match:   choice among several places. recent takes the latest place with a full continuation, or else the longest
             continuation. frequent takes the most frequent continuation token by token, and the latest one on a tie
    branches: number of different continuations that are merged into a tree
    scope:   additional texts that suffix_automaton searches. session: earlier outputs of the run; corpus: the text file
             ``corpus``, whose automaton takes about 10 µs and 1 kB per token
    length_factor: suffix_automaton drafts at most this many tokens per matched token, and at most ``num_tokens``
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
        """Read the corpus. Raises RequestError if it is not a text file."""
        if self.corpus is not None and isinstance(self._index, AutomatonIndex):
            try:
                text = read_text(expanded(self.corpus, "drafter.corpus"))
            except RequestError as error:
                raise RequestError(f"drafter.corpus={self.corpus}: not a readable text file ({error})") from None
            tokens = resources.encode(text)
            self._index.memorize(tokens)
            self.details = (f"corpus of {len(tokens)} tokens",)

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        if isinstance(self._index, AutomatonIndex):
            self._index.start((sequence.prompt, sequence.output) for sequence in finished)

    def begin(self, prompt: Tensor) -> None:
        self._index.begin(prompt.tolist())

    def rewind(self, length: int) -> None:
        self._index.rewind(length)

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
        """Return up to ``branches`` continuations of at most ``length`` tokens; none is a prefix of an earlier one."""
        found = [path for place in match.places if (path := _follow(match, place, length))]
        # Sorting is stable: among equally long continuations the latest stays first.
        found.sort(key=len, reverse=True)
        chosen: list[tuple[int, ...]] = []
        while found and len(chosen) < self.branches:
            chosen.append(found[0] if self.match == "recent" else most_frequent(found))
            found = [path for path in found if path != chosen[-1][: len(path)]]
        return chosen


class LookupIndex:
    """Places of the tokens after every n-gram of the sequence, for n in ``sizes``. Preferred sizes come first."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], list[int]] = {}

    def begin(self, prompt: list[int]) -> None:
        self._followers.clear()
        self._tokens = []
        self.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        """Add the new tokens of the sequence, which are those after the known ones."""
        for position in range(max(len(self._tokens), 1), len(tokens)):
            for size in self._sizes:
                if size <= position:
                    key = tuple(tokens[position - size : position])
                    self._followers.setdefault(key, []).append(position)
        self._tokens += tokens[len(self._tokens) :]

    def rewind(self, length: int) -> None:
        """Remove all tokens behind the first ``length``."""
        for position in range(len(self._tokens) - 1, length - 1, -1):
            for size in self._sizes:
                if size <= position:
                    key = tuple(self._tokens[position - size : position])
                    self._followers[key].pop()
                    if not self._followers[key]:
                        del self._followers[key]
        del self._tokens[length:]

    def match(self) -> Match:
        for size in self._sizes:
            places = self._followers.get(tuple(self._tokens[-size:]))
            if places is not None and size < len(self._tokens):
                return Match(size, self._tokens, places[: -LOOKUP_PLACES - 1 : -1])
        return Match(0, self._tokens, [])


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


def _follow(match: Match, place: int, length: int) -> tuple[int, ...]:
    path = match.text[place : place + length]
    if SEPARATOR in path:
        return tuple(path[: path.index(SEPARATOR)])
    if match.loops and path:
        path = (path * -(-length // len(path)))[:length]
    return tuple(path)
