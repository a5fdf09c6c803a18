"""Data that drafters and verifiers exchange: the draft (a token tree), the context and the result of a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quasar.decoding.sampling import Sampling, draw, race

ROOT = -1
"""Parent of the draft tokens that directly follow the last emitted token."""

MAX_ROWS = 64
"""Most rows of a pass that CPU tapes and CUDA graphs record. A larger pass runs op by op, which is slow."""


@dataclass(frozen=True)
class Scratch:
    """Extra rows of the verification pass that are not kept in the KV cache (Lookahead's window).

    A scratch row attends to the committed context, the last emitted token and the scratch rows that ``mask`` allows. It
    never attends to a draft token.

    tokens:  int64 [S]
    offsets: int64 [S], position of each row relative to the last emitted token (1 = directly after it)
    mask:    bool [S, S], True if the row (first axis) attends to the scratch row (second axis), itself included
    outputs: int64 [O], the rows whose logits are returned to the drafter in ``Drafter.observe``
    """

    tokens: Tensor
    offsets: Tensor
    mask: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Draft:
    """A tree of guessed tokens after the last emitted token. In the common case it is a chain.

    tokens:  list of T token ids; every parent comes before its children
    parents: list of T indices into ``tokens``; ``ROOT`` for tokens that follow the last emitted token
    probabilities: float32 [T, V] or None. Row t is the distribution that token t was drawn from. If siblings were drawn
        without replacement, the row of a later sibling excludes the earlier ones and is normalized again. None means
        that every token was chosen deterministically (a one-hot distribution)
    scratch: extra rows of the verification pass, or None

    Example: after "the cat" the paths "sat on" and "sat down" share their first token. They are the tree with
    ``tokens=[sat, on, down]`` and ``parents=[ROOT, 0, 0]``.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probabilities: Tensor | None = None
    scratch: Scratch | None = None

    @staticmethod
    def chain(tokens: list[int], probabilities: Tensor | None = None) -> Draft:
        """Build a draft without branches, in which each token follows the previous one."""
        return Draft(tokens, list(range(-1, len(tokens) - 1)), probabilities)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """Number of rows of the verification pass: the last token, the draft tokens and the scratch rows."""
        return 1 + len(self.tokens) + (len(self.scratch.tokens) if self.scratch else 0)

    @property
    def is_chain(self) -> bool:
        return all(parent == index - 1 for index, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """Return the distance of every draft token from the last emitted token, 1 for its direct successors."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def children(self, node: int) -> list[int]:
        """Return the indices of the tokens that follow ``node``, in the order in which acceptance tries them."""
        return [index for index, parent in enumerate(self.parents) if parent == node]

    def offsets(self) -> Tensor:
        """Return the position of every row relative to the last emitted token, int64 [rows]."""
        own = _chain_offsets(1 + len(self)) if self.is_chain else torch.tensor([0, *self.depths()], dtype=torch.int64)
        return torch.cat([own, self.scratch.offsets]) if self.scratch else own

    def row_tokens(self, last: int) -> Tensor:
        """Return the token ids of all rows of the verification pass, int64 [rows]."""
        own = torch.tensor([last, *self.tokens], dtype=torch.int64)
        return torch.cat([own, self.scratch.tokens]) if self.scratch else own

    def block_mask(self) -> Tensor:
        """Return the pass's attention mask, bool [rows, rows]. A draft token attends to its ancestors and itself."""
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
    """The sequence so far: prompt and emitted tokens. The last token is not in the KV cache yet.

    sampling:  settings of the distribution that tokens are drawn from
    generator: stream of random numbers of this sequence, seeded by the run's seed and the prompt
    """

    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    generator: torch.Generator

    @property
    def last(self) -> int:
        return self.tokens[-1]

    def draw(self, probabilities: Tensor, offset: int) -> int:
        """Draw the token ``offset`` places after the context (0: the next one) from a distribution [V].

        With coupled sampling every model draws it with the same random numbers, else with the next ones of the stream.
        """
        if self.sampling.coupled:
            return int(self.race(probabilities, offset).argmax())
        return draw(probabilities, self.generator)

    def race(self, probabilities: Tensor, offset: int) -> Tensor:
        """Return `quasar.decoding.sampling.race` [V] for the token ``offset`` places after the context."""
        return race(probabilities, self.generator.initial_seed(), len(self.tokens) + offset)


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    emitted:        tokens appended to the context, those of ``path`` and one more, which is the bonus token or the
                    draft token that ended the output
    path:           indices of the accepted draft tokens, root first
    logits:         float [T + 1, V], the verifier's logits after the last token and after each draft token
    scratch_logits: float [O, V] for ``Scratch.outputs``, or None
    cut:            whether the output ended inside the accepted path, so that no token after ``path`` was rejected
    """

    draft: Draft
    emitted: list[int]
    path: list[int]
    logits: Tensor
    scratch_logits: Tensor | None
    cut: bool = False


@functools.lru_cache(maxsize=64)
def _chain_offsets(size: int) -> Tensor:
    return torch.arange(size)


@functools.lru_cache(maxsize=64)
def _chain_mask(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril_()


def merge_into_tree(paths: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Return tokens and parents of the tree that contains every path, with shared prefixes once and paths in order."""
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
