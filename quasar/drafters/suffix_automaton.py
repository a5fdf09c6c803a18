"""Drafts what followed the longest suffix of the context that occurred before, in this text or in others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, validate_call
from torch import Tensor

from quasar.config.inputs import expanded, read_text
from quasar.decoding.draft import Context, Draft, merge_into_tree
from quasar.drafters._continuations import Match, continuations, scored_tree
from quasar.drafters._suffix_automaton import AutomatonIndex
from quasar.drafters.base import Drafter, FinishedSequence, Resources
from quasar.errors import RequestError


class SuffixAutomatonDrafter(Drafter):
    """Matches of any length by a suffix automaton (SAM-Decoding, Hu et al. 2024) and SuffixDecoding's trees.

    A new token takes amortized constant time, however long the matches are. The draft is at most ``length_factor``
    times as long as the match: a long match is a passage that is being copied, a short one may be a coincidence.

    ``match=scored`` drafts the tree of SuffixDecoding (Oliaro et al. 2024): the continuations' tokens with their
    relative frequencies, cut to the most probable ones (`scored_tree`). Shorter matches have more occurrences, so their
    frequencies are more reliable, while longer ones fit better. As in the paper, a tree is made for several lengths of
    the match, and the tree with the highest expected number of accepted tokens is the draft.

    Example with length_factor = 2: in "x a b c … y a b d … a b", the suffix "a b" occurred twice, so that the tree may
    have 4 tokens: c and d with probability 1/2 each, and what followed each of them.

    num_tokens: maximum number of tokens per draft; for several ``branches``, per branch
    match:   scored, or one continuation for each of ``branches``: recent takes the latest place with a full
             continuation, or else the longest continuation; frequent takes the most frequent one token by token
    branches: recent and frequent: number of different continuations that are merged into a tree
    n_min:   tokens of the shortest match
    length_factor: most draft tokens per matched token; None: always ``num_tokens``
    min_probability: scored: tokens with a lower estimated probability are left out
    scope:   additional texts to search. session: earlier outputs of the run; corpus: the text file ``corpus``, whose
             automaton takes about 10 µs and 1 kB per token
    """

    @validate_call
    def __init__(
        self,
        num_tokens: PositiveInt = 16,
        match: Literal["scored", "recent", "frequent"] = "scored",
        branches: PositiveInt = 1,
        n_min: PositiveInt = 1,
        length_factor: Annotated[float, Field(gt=0)] | None = 2.0,
        min_probability: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        scope: Literal["prompt", "session", "corpus"] = "prompt",
        corpus: str | None = None,
    ) -> None:
        if (scope == "corpus") != (corpus is not None):
            raise RequestError(
                f"drafter.scope={scope} with drafter.corpus={corpus}: scope=corpus and a text file belong together"
            )
        if match == "scored" and branches > 1:
            raise RequestError(
                f"drafter.branches={branches} with drafter.match=scored, whose tree branches by itself; use "
                "branches=1, or match=recent or frequent"
            )
        self.num_tokens, self.match, self.branches, self.n_min = num_tokens, match, branches, n_min
        self.length_factor, self.min_probability, self.corpus = length_factor, min_probability, corpus
        self._index = AutomatonIndex(remember_outputs=scope == "session")

    def prepare(self, resources: Resources) -> None:
        """Read the corpus. Raises RequestError if it is not a text file."""
        if self.corpus is not None:
            try:
                text = read_text(expanded(self.corpus, "drafter.corpus"))
            except RequestError as error:
                raise RequestError(f"drafter.corpus={self.corpus}: not a readable text file ({error})") from None
            tokens = resources.encode(text)
            self._index.memorize(tokens)
            self.details = (f"corpus of {len(tokens)} tokens",)

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        self._index.start((sequence.prompt, sequence.output) for sequence in finished)

    def begin(self, prompt: Tensor) -> None:
        self._index.begin(prompt.tolist())

    def rewind(self, length: int) -> None:
        self._index.rewind(length)

    def propose(self, context: Context, budget: int) -> Draft:
        self._index.extend(context.tokens)
        if self.match == "scored":
            return self._scored(budget)
        match = self._index.match()
        if match.length < self.n_min:
            return Draft()
        length = min(budget, self._length(match))
        return Draft(*merge_into_tree(continuations(match, length, self.match == "frequent", self.branches)))

    def _scored(self, budget: int) -> Draft:
        """Return the tree with the highest score, that of the longest match on a tie."""
        matches = [match for match in self._index.matches() if match.length >= self.n_min]
        trees = [scored_tree(match, self._length(match), budget, self.min_probability) for match in matches]
        best = max(trees, key=lambda tree: tree.score, default=None)
        return Draft() if best is None else Draft(best.tokens, best.parents)

    def _length(self, match: Match) -> int:
        """Return the most tokens that are drafted after a match."""
        if self.length_factor is None:
            return self.num_tokens
        return min(self.num_tokens, max(1, int(self.length_factor * match.length)))
