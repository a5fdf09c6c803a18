"""Lookahead decoding: Jacobi iterations in the verification pass fill a pool of n-grams, which are the drafts."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, validate_call
from torch import Tensor

from quasar.decoding.draft import MAX_ROWS, Context, Draft, Scratch, StepResult, merge_into_tree
from quasar.decoding.sampling import most_likely
from quasar.drafters._pass_cost import FREE_ROWS, PassCost
from quasar.drafters._tree_size import Candidates, Kind, TreePruning
from quasar.drafters._window_size import WindowSize
from quasar.drafters.base import Drafter, Resources
from quasar.errors import RequestError

FIRST_RATE = 0.5
"""Assumed acceptance rate of a guess's first token before there is evidence; that of the r-th guess is this / r."""


WINDOW, TEXT = "window", "text"
"""Sources of n-grams in the pool."""


class LookaheadDrafter(Drafter):
    """Lookahead decoding (Fu et al. 2024) with window W, n-gram size N and at most G guesses per step.

    The window contains N - 1 Jacobi iterates of the positions after the last token, the oldest first. Its rows are
    scratch rows of every verification pass, and the argmaxes of the newest iterate's rows are the next iterate. The
    diagonal of column i (the oldest iterate at position i, the next one at i + 1, …) is an n-gram, which is added to
    the pool under its first token. The guesses are the n-grams in the pool that begin with the last emitted token,
    merged into a tree. As in the authors' code, the window moves by one position per step, regardless of how many
    tokens were accepted.

    The cost per pass is (N - 1) W - 1 scratch rows and up to G (N - 1) draft rows. There are no additional passes.

    ``window=auto`` chooses W in every period of eight steps (`WindowSize`) and the guesses' tokens in every step
    (`TreePruning`) by the measured time of a pass, from recent acceptance: how many tokens n-grams of the window have
    contributed, and how often tokens of guesses were right, by source (window or text), depth and age. Where rows are
    expensive and guesses are wrong, passes have a single row as in autoregressive decoding. The estimates are kept from
    prompt to prompt. The greedy output does not depend on the sizes.

    window, ngram, guesses: W or auto, N and G
    pool_capacity: number of n-grams kept per first token, the most recently seen ones; by default G
    pool_from_prompt: whether the n-grams of the prompt and the output are added to the pool too
    window_from_prompt: whether the first iterate consists of random tokens of the prompt, drawn with ``seed``;
        otherwise it repeats the last token of the prompt
    """

    @validate_call
    def __init__(
        self,
        window: PositiveInt | Literal["auto"] = "auto",
        ngram: Annotated[int, Field(ge=3)] = 4,
        guesses: PositiveInt = 5,
        pool_capacity: PositiveInt | None = None,
        pool_from_prompt: bool = True,
        window_from_prompt: bool = True,
        seed: int = 0,
    ) -> None:
        _require_rows(window, ngram, guesses)
        self.window, self.ngram, self.guesses = window, ngram, guesses
        self.pool_capacity = pool_capacity or guesses
        self.pool_from_prompt, self.window_from_prompt = pool_from_prompt, window_from_prompt
        self.seed = seed
        self._pool: dict[int, OrderedDict[tuple[int, ...], bool]] = {}
        self._jacobi = JacobiWindow(ngram, [0], seed)
        self._fixed_width = 0 if window == "auto" else window
        self._sizes = Sizes(FREE_ROWS, ngram, guesses) if window == "auto" else None
        self._indexed: list[tuple[int, ...]] = []
        self._last = 0
        self._widths: list[int | float | str] = []

    @property
    def chooses_size(self) -> bool:
        return self._sizes is not None

    def prepare(self, resources: Resources) -> None:
        """Measure the passes of the verifier if the window is chosen automatically."""
        if self._sizes is not None:
            self.use(resources.pass_cost)

    def use(self, cost: PassCost) -> None:
        """Choose sizes by these times of a pass. Without this, rows count as free."""
        self._sizes = Sizes(cost, self.ngram, self.guesses)

    def begin(self, prompt: Tensor) -> None:
        self._pool.clear()
        self._indexed = []
        # Tokens of the prompt are more likely to fit than arbitrary tokens.
        tokens = prompt if self.window_from_prompt else prompt[-1:]
        self._jacobi = JacobiWindow(self.ngram, tokens.tolist(), self.seed)
        self._widths = []

    def propose(self, context: Context, budget: int) -> Draft:
        if self.pool_from_prompt:
            self._index(context.tokens)
        if budget == 0:
            self._widths.append(0)
            return Draft()
        self._last, cached = context.last, len(context.tokens) - 1
        self._jacobi.resize(self._fixed_width if self._sizes is None else self._sizes.window.choose(cached))
        self._widths.append(self._jacobi.width)
        scratch = self._jacobi.scratch()
        known = islice(reversed(self._pool.get(context.last, {}).items()), self.guesses)
        guesses = [(tail[:budget], from_window) for tail, from_window in known]
        tokens, parents = merge_into_tree([guess for guess, _ in guesses])
        if self._sizes is not None:
            tree = Candidates(tokens, parents, _kinds(guesses))
            rows = 0 if scratch is None else len(scratch.tokens)
            tokens, parents = self._sizes.tree.prune(tree, cached, rows)
        return Draft(tokens, parents, scratch=scratch)

    def observe(self, step: StepResult) -> None:
        if self._sizes is not None:
            self._sizes.add(step)
        if step.scratch_logits is None:
            return
        for ngram in self._jacobi.advance(self._last, most_likely(step.scratch_logits)):
            self._remember(ngram, from_window=True)

    def rewind(self, length: int) -> None:
        """Remove the n-grams that end behind the first ``length`` tokens, even if the pool had them before."""
        kept = max(0, length - self.ngram + 1)
        for first, *tail in self._indexed[kept:]:
            self._pool[first].pop(tuple(tail), None)
        del self._indexed[kept:]

    def notes(self) -> dict[str, list[int | float | str]]:
        """Return the window's width in every step if it is chosen automatically."""
        return {} if self._sizes is None else {"window": self._widths}

    def _remember(self, ngram: tuple[int, ...], from_window: bool) -> None:
        """Add an n-gram as the most recent one of its first token; if the pool is full, remove the oldest one.

        Only the window has found an n-gram whose value is True.
        """
        tails = self._pool.setdefault(ngram[0], OrderedDict())
        tails[ngram[1:]] = from_window and tails.get(ngram[1:], True)
        tails.move_to_end(ngram[1:])
        if len(tails) > self.pool_capacity:
            tails.popitem(last=False)

    def _index(self, tokens: list[int]) -> None:
        for end in range(len(self._indexed) + self.ngram, len(tokens) + 1):
            self._indexed.append(tuple(tokens[end - self.ngram : end]))
            self._remember(self._indexed[-1], from_window=False)


class JacobiWindow:
    """The window's iterates, the oldest first. Column c of each is a guess at the same distance from the last token.

    A window of width W has N - 1 iterates, the oldest of W - 1 tokens and the others of W. It begins with one longer
    iterate, because each warm-up step adds an iterate and removes a column.

    ngram: N
    tokens: the tokens that new columns are drawn from, with ``seed``
    """

    def __init__(self, ngram: int, tokens: Sequence[int], seed: int) -> None:
        self.levels: list[list[int]] = []
        self._ngram, self._tokens, self._random = ngram, tokens, random.Random(seed)

    @property
    def width(self) -> int:
        return len(self.levels[0]) - (self._ngram - 2 - len(self.levels)) if self.levels else 0

    def resize(self, width: int) -> None:
        """Change the width: drop the last columns or add random ones. Width 0 drops the window."""
        if width == 0:
            self.levels = []
        elif not self.levels:
            self.levels = [self._drawn(width + self._ngram - 3)]
        elif (more := width - self.width) != 0:
            self.levels = [level[: len(level) + min(more, 0)] + self._drawn(more) for level in self.levels]

    def scratch(self) -> Scratch | None:
        """Return the window's rows of the next pass, or None if its width is 0."""
        if not self.levels:
            return None
        tokens = [token for level in self.levels for token in level]
        offsets, mask, outputs = window_layout(tuple(map(len, self.levels)))
        return Scratch(torch.tensor(tokens), offsets, mask, outputs)

    def advance(self, last: int, iterate: list[int]) -> list[tuple[int, ...]]:
        """Move the window by one position and return the n-grams of its diagonals; none during the warm-up.

        last: the token before the window
        iterate: the argmaxes of the newest iterate's rows
        """
        levels = self.levels
        if len(levels) < self._ngram - 1:
            # The predictions of the first iterate are already one position after its tokens.
            self.levels = [level[1:] for level in levels] + [iterate if len(levels) == 1 else iterate[1:]]
            return []
        first = [last, *levels[0]]
        found = [
            (first[column], *(level[column] for level in levels[1:]), predicted)
            for column, predicted in enumerate(iterate)
        ]
        self.levels = [levels[1][1:], *levels[2:], iterate]
        return found

    def _drawn(self, count: int) -> list[int]:
        return [self._random.choice(self._tokens) for _ in range(count)]


class Sizes:
    """The sizes of lookahead's steps that ``window=auto`` chooses, and the estimates behind them."""

    def __init__(self, cost: PassCost, ngram: int, guesses: int) -> None:
        widest = max(width for width in range(MAX_ROWS) if _rows(width, ngram, guesses) <= MAX_ROWS)
        self.window = WindowSize(cost, [window_rows(width, ngram) for width in range(widest + 1)])
        self.tree = TreePruning(cost)

    def add(self, step: StepResult) -> None:
        """Count the accepted tokens of a step whose draft ``tree`` has pruned."""
        found = sum(self.tree.kinds[node].key[0] == WINDOW for node in step.path)
        self.window.add(len(step.draft), found, len(step.emitted) - found)
        self.tree.add(step)


def window_rows(width: int, ngram: int) -> int:
    """Return the most scratch rows of a window of this width, including its warm-up."""
    if width == 0:
        return 0
    warming = ((width + ngram - 2 - k) + (k - 1) * (width + ngram - 1 - k) for k in range(1, ngram - 1))
    return max((ngram - 1) * width - 1, *warming)


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


def _rows(width: int, ngram: int, guesses: int) -> int:
    return 1 + window_rows(width, ngram) + guesses * (ngram - 1)


def _require_rows(window: int | Literal["auto"], ngram: int, guesses: int) -> None:
    """Raise RequestError if a pass could have more rows than passes are recorded for."""
    rows = _rows(1 if window == "auto" else window, ngram, guesses)
    if rows <= MAX_ROWS:
        return
    room = (MAX_ROWS - 1 - window_rows(1, ngram)) // (ngram - 1)
    fitting = [width for width in range(1, MAX_ROWS) if _rows(width, ngram, guesses) <= MAX_ROWS]
    if fitting:
        remedy = f"drafter.window={fitting[-1]} or auto"
    else:
        remedy = f"at most drafter.guesses={room}" if room > 0 else "a smaller drafter.ngram"
    raise RequestError(
        f"drafter.window={window} with drafter.ngram={ngram} and drafter.guesses={guesses} needs up to {rows} rows in "
        f"a pass ({window_rows(1 if window == 'auto' else window, ngram)} for the window, {guesses * (ngram - 1)} for "
        f"the guesses), and a pass has at most {MAX_ROWS}; use {remedy}"
    )


def _kinds(guesses: Sequence[tuple[tuple[int, ...], bool]]) -> list[Kind]:
    """Return the kind of every token of the merged guesses. A token that several share belongs to the latest one.

    The key is the source of the n-gram (``WINDOW`` if only the window has found it), the depth, and for first tokens
    the age of the guess among those with another first token, 0 for the latest.
    """
    kinds: dict[tuple[int, ...], Kind] = {}
    age = 0
    for guess, from_window in guesses:
        source = WINDOW if from_window else TEXT
        for depth in range(1, len(guess) + 1):
            if guess[:depth] in kinds:
                continue
            if depth == 1:
                kinds[guess[:1]] = Kind((source, 1, age), FIRST_RATE / (1 + age))
                age += 1
            else:
                kinds[guess[:depth]] = Kind((source, depth), FIRST_RATE)
    return list(kinds.values())
