"""What drafters and verifiers exchange: the draft (a token tree), the context and the result of a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quasar.decoding.sampling import Sampling

ROOT = -1
"""Parent of the draft tokens that directly follow the last emitted token."""


@dataclass(frozen=True)
class Scratch:
    """Extra rows that ride in the verification pass and leave no trace in the KV cache (Lookahead's window).

    A scratch row sees the committed context, the last emitted token and the scratch rows of its row of
    ``mask``; never a draft token.

    tokens:  int64 [S]
    offsets: int64 [S], position of each row relative to the last emitted token (1 = directly after it)
    mask:    bool [S, S], True where row (first axis) sees scratch row (second axis); includes itself
    outputs: int64 [O], the rows whose logits come back through ``Drafter.observe``
    """

    tokens: Tensor
    offsets: Tensor
    mask: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Draft:
    """A tree of guessed tokens after the last emitted token; a chain is the common case.

    tokens:  list of T token ids, every parent before its children
    parents: list of T indices into ``tokens``; ``ROOT`` for tokens that follow the last emitted token
    probabilities: float32 [T, V] or None. Row t is the distribution from which token t was drawn, given the siblings
        before it: of siblings drawn without replacement a later one's row lacks the earlier tokens and is normalized
        again. None means that every token was chosen deterministically (a one-hot distribution)
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probabilities: Tensor | None = None
    scratch: Scratch | None = None

    @staticmethod
    def chain(tokens: list[int], probabilities: Tensor | None = None) -> Draft:
        """A draft without branches: each token follows the one before it."""
        return Draft(tokens, list(range(-1, len(tokens) - 1)), probabilities)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """Rows of the verification pass: the last token, the draft and the scratch rows."""
        return 1 + len(self.tokens) + (len(self.scratch.tokens) if self.scratch else 0)

    @property
    def is_chain(self) -> bool:
        return all(parent == index - 1 for index, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """Distance of every draft token from the last emitted token, 1 for its direct successors."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def children(self, node: int) -> list[int]:
        """Indices of the tokens that follow ``node``, in the order in which they are to be tried."""
        return [index for index, parent in enumerate(self.parents) if parent == node]

    def offsets(self) -> Tensor:
        """Position of every row relative to the last emitted token, int64 [rows]."""
        own = _chain_offsets(1 + len(self)) if self.is_chain else torch.tensor([0, *self.depths()], dtype=torch.int64)
        return torch.cat([own, self.scratch.offsets]) if self.scratch else own

    def row_tokens(self, last: int) -> Tensor:
        """Token ids of all rows of the verification pass, int64 [rows]."""
        own = torch.tensor([last, *self.tokens], dtype=torch.int64)
        return torch.cat([own, self.scratch.tokens]) if self.scratch else own

    def block_mask(self) -> Tensor:
        """Which row of the block sees which, bool [rows, rows]: a draft token sees its ancestors and itself."""
        size = 1 + len(self.tokens)
        if self.is_chain:
            tree = _chain_mask(size)
        else:
            tree = torch.eye(size, dtype=torch.bool)
            for index, parent in enumerate(self.parents):
                tree[index + 1] |= tree[parent + 1]
            tree[:, 0] = True
        if self.scratch is None:
            return tree
        mask = torch.zeros(self.rows, self.rows, dtype=torch.bool)
        mask[:size, :size] = tree
        mask[size:, 0] = True
        mask[size:, size:] = self.scratch.mask
        return mask


@dataclass
class Context:
    """The sequence so far, as drafters see it: prompt and emitted tokens, the last one not yet in the KV cache."""

    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    generator: torch.Generator

    @property
    def last(self) -> int:
        return self.tokens[-1]


@dataclass(frozen=True)
class StepResult:
    """What one step decided.

    emitted:        tokens appended to the context, the bonus token last
    path:           indices of the accepted draft tokens, root first
    logits:         float [T + 1, V], the verifier's logits after the last token and after each draft token
    scratch_logits: float [O, V] for ``Scratch.outputs``, or None
    """

    draft: Draft
    emitted: list[int]
    path: list[int]
    logits: Tensor
    scratch_logits: Tensor | None


@functools.lru_cache(maxsize=64)
def _chain_offsets(size: int) -> Tensor:
    return torch.arange(size)


@functools.lru_cache(maxsize=64)
def _chain_mask(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril_()


def merge_into_tree(paths: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Tokens and parents of the tree that holds every path, shared prefixes once, earlier paths first."""
    tokens: list[int] = []
    parents: list[int] = []
    nodes: dict[tuple[int, int], int] = {}
    for path in paths:
        parent = ROOT
        for token in path:
            if (parent, token) not in nodes:
                nodes[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
            parent = nodes[parent, token]
    return tokens, parents
