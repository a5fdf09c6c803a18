"""Lookahead decoding: Jacobi iterations in the verification pass fill a pool of n-grams, which are the drafts."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from itertools import islice
from typing import Annotated

import torch
from pydantic import Field, PositiveInt, validate_call
from torch import Tensor

from quasar.decoding.draft import Context, Draft, Scratch, StepResult, merge_into_tree
from quasar.decoding.sampling import most_likely
from quasar.drafters.base import Drafter


class LookaheadDrafter(Drafter):
    """Lookahead decoding (Fu et al. 2024) with window W, n-gram size N and at most G guesses per step.

    The window contains N - 1 Jacobi iterates of the positions after the last token, the oldest first. Its rows are
    scratch rows of every verification pass, and the argmaxes of the newest iterate's rows are the next iterate. The
    diagonal of column i (the oldest iterate at position i, the next one at i + 1, …) is an n-gram, which is added to
    the pool under its first token. The guesses are the n-grams in the pool that begin with the last emitted token,
    merged into a tree. As in the authors' code, the window moves by one position per step, regardless of how many
    tokens were accepted.

    The cost per pass is (N - 1) W - 1 scratch rows and up to G (N - 1) draft rows. There are no additional passes.

    window, ngram, guesses: W, N and G
    pool_capacity: number of n-grams kept per first token, the most recently seen ones; by default G
    pool_from_prompt: whether the n-grams of the prompt and the output are added to the pool too
    window_from_prompt: whether the first iterate consists of random tokens of the prompt, drawn with ``seed``;
        otherwise it repeats the last token of the prompt
    """

    @validate_call
    def __init__(
        self,
        window: PositiveInt = 5,
        ngram: Annotated[int, Field(ge=3)] = 4,
        guesses: PositiveInt = 5,
        pool_capacity: PositiveInt | None = None,
        pool_from_prompt: bool = True,
        window_from_prompt: bool = True,
        seed: int = 0,
    ) -> None:
        self.window, self.ngram, self.guesses = window, ngram, guesses
        self.pool_capacity = pool_capacity or guesses
        self.pool_from_prompt, self.window_from_prompt = pool_from_prompt, window_from_prompt
        self.seed = seed
        self._pool: dict[int, OrderedDict[tuple[int, ...], None]] = {}
        self._levels: list[list[int]] = []
        self._indexed: list[tuple[int, ...]] = []
        self._last = 0

    def begin(self, prompt: Tensor) -> None:
        self._pool.clear()
        self._indexed = []
        # Tokens of the prompt are more likely to fit than arbitrary tokens. The first iterate is longer than the
        # window, because each warm-up step removes one column.
        choose = random.Random(self.seed)
        tokens: list[int] = prompt.tolist() if self.window_from_prompt else prompt[-1:].tolist()
        self._levels = [[choose.choice(tokens) for _ in range(self.window + self.ngram - 3)]]

    def propose(self, context: Context, budget: int) -> Draft:
        if self.pool_from_prompt:
            self._index(context.tokens)
        if budget == 0:
            return Draft()
        self._last = context.last
        guesses = islice(reversed(self._pool.get(context.last, {})), self.guesses)
        tokens, parents = merge_into_tree([guess[:budget] for guess in guesses])
        return Draft(tokens, parents, scratch=self._scratch())

    def observe(self, step: StepResult) -> None:
        if step.scratch_logits is None:
            return
        iterate = most_likely(step.scratch_logits)
        levels = self._levels
        if len(levels) < self.ngram - 1:
            # Warm-up: add an iterate and move the window by one position. The predictions of the first iterate are
            # already one position after its tokens.
            self._levels = [level[1:] for level in levels] + [iterate if len(levels) == 1 else iterate[1:]]
            return
        first = [self._last, *levels[0]]
        for column, predicted in enumerate(iterate):
            self._remember((first[column], *(level[column] for level in levels[1:]), predicted))
        self._levels = [levels[1][1:], *levels[2:], iterate]

    def rewind(self, length: int) -> None:
        """Remove the n-grams that end behind the first ``length`` tokens, even if the pool had them before."""
        kept = max(0, length - self.ngram + 1)
        for first, *tail in self._indexed[kept:]:
            self._pool[first].pop(tuple(tail), None)
        del self._indexed[kept:]

    def _scratch(self) -> Scratch:
        tokens = [token for level in self._levels for token in level]
        offsets, mask, outputs = window_layout(tuple(map(len, self._levels)))
        return Scratch(torch.tensor(tokens), offsets, mask, outputs)

    def _remember(self, ngram: tuple[int, ...]) -> None:
        """Add an n-gram as the most recent one of its first token; if the pool is full, remove the oldest one."""
        tails = self._pool.setdefault(ngram[0], OrderedDict())
        tails[ngram[1:]] = None
        tails.move_to_end(ngram[1:])
        if len(tails) > self.pool_capacity:
            tails.popitem(last=False)

    def _index(self, tokens: list[int]) -> None:
        for end in range(len(self._indexed) + self.ngram, len(tokens) + 1):
            self._indexed.append(tuple(tokens[end - self.ngram : end]))
            self._remember(self._indexed[-1])


@functools.lru_cache(maxsize=64)
def window_layout(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return offsets [S], mask bool [S, S] and output rows [O] of a window whose iterates have these lengths.

    Column c of iterate l has offset c + 1 for the oldest iterate (l = 0) and offset c + l for the others. It attends to
    the oldest iterate up to its diagonal and to the same column of iterates 1 to l. The outputs are the rows of the
    newest iterate.
    """
    starts = [sum(lengths[:level]) for level in range(len(lengths))]
    offsets = [column + max(level, 1) for level, length in enumerate(lengths) for column in range(length)]
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for level, length in enumerate(lengths):
        for column in range(length):
            row = starts[level] + column
            mask[row, : column + 1 if level == 0 else min(column, lengths[0])] = True
            for newer in range(1, level + 1):
                mask[row, starts[newer] + column] = True
    outputs = torch.arange(starts[-1], sum(lengths))
    return torch.tensor(offsets), mask, outputs
