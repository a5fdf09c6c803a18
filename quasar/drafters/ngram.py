"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last few tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, validate_call
from torch import Tensor

from quasar.decoding.draft import Context, Draft, merge_into_tree
from quasar.drafters._continuations import Match, continuations
from quasar.drafters.base import Drafter
from quasar.errors import RequestError

LOOKUP_PLACES = 64
"""Number of latest places that lookup considers per n-gram. This bounds the cost of a step."""


class NgramDrafter(Drafter):
    """Prompt lookup decoding (Saxena 2023).

    It finds a suffix of the context that occurred before in the prompt or the output, and drafts the tokens that
    followed it there. It matches the longest suffix of n_max down to n_min tokens, with one dictionary lookup per n and
    step, and n_max insertions per new token. It needs no model pass.

    Example with n_max = 3: the context is "the cat sat . the cat". The suffix "the cat" (n = 2) occurred before and was
    followed by "sat . the cat", which is the draft.

    num_tokens: maximum number of tokens per draft
    match:   choice among several places. recent takes the latest place with a full continuation, or else the longest
             continuation, as transformers does. first takes the earliest place, as vLLM does. frequent takes the most
             frequent continuation token by token, and the latest one on a tie
    branches: number of different continuations that are merged into a tree
    """

    @validate_call
    def __init__(
        self,
        num_tokens: PositiveInt = 5,
        match: Literal["recent", "first", "frequent"] = "recent",
        n_max: PositiveInt = 3,
        n_min: PositiveInt = 1,
        branches: PositiveInt = 1,
    ) -> None:
        if n_min > n_max:
            raise RequestError(
                f"drafter.n_min={n_min} is larger than drafter.n_max={n_max}; lower one or raise the other"
            )
        if match == "first" and branches > 1:
            raise RequestError(
                f"drafter.branches={branches} with drafter.match=first, which knows a single place; use branches=1, or "
                "match=recent or frequent"
            )
        self.num_tokens, self.match, self.branches = num_tokens, match, branches
        self._index = LookupIndex(range(n_max, n_min - 1, -1), keep_first=match == "first")

    def begin(self, prompt: Tensor) -> None:
        self._index.begin(prompt.tolist())

    def rewind(self, length: int) -> None:
        self._index.rewind(length)

    def propose(self, context: Context, budget: int) -> Draft:
        self._index.extend(context.tokens)
        length = min(self.num_tokens, budget)
        paths = continuations(self._index.match(), length, self.match == "frequent", self.branches)
        return Draft(*merge_into_tree(paths))


class LookupIndex:
    """Places of the tokens after every n-gram of the sequence, for n in ``sizes``. Preferred sizes come first.

    keep_first: keep only the first place of every n-gram, instead of the latest ones
    """

    def __init__(self, sizes: range, keep_first: bool = False) -> None:
        self._sizes, self._keep_first = sizes, keep_first
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
                    places = self._followers.setdefault(tuple(tokens[position - size : position]), [])
                    if not (self._keep_first and places):
                        places.append(position)
        self._tokens += tokens[len(self._tokens) :]

    def rewind(self, length: int) -> None:
        """Remove all tokens behind the first ``length``."""
        for position in range(len(self._tokens) - 1, length - 1, -1):
            for size in self._sizes:
                if size <= position:
                    key = tuple(self._tokens[position - size : position])
                    if self._followers[key][-1] == position:
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
