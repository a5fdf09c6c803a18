"""Token Recycling: drafts a tree of the tokens that the verifier itself found likely after the same tokens before."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt, validate_call
from torch import Tensor

from quasar.decoding.draft import MAX_ROWS, ROOT, Context, Draft, StepResult
from quasar.drafters._pass_cost import FREE_ROWS, PassCost
from quasar.drafters._tree_size import Candidates, Kind, TreePruning
from quasar.drafters.base import Drafter, FinishedSequence, Resources

MOST_TOKENS = MAX_ROWS - 1
UNKNOWN = -1


class RecyclingDrafter(Drafter):
    """Token Recycling (Luo et al. 2024, arXiv 2408.08696).

    An adjacency matrix has the ``candidates`` most likely next tokens of every token, from the logits of the last pass
    in which the token was a row. Rejected draft tokens count too: their logits are the waste that is recycled. A draft
    is a tree of fixed shape (`static_tree`): its root is the last token, and the r-th child of a node is the r-th
    candidate of the node's token. Before its first pass, a token's candidates are the tokens that followed it in the
    prompt, the latest first. There is no other model and no other pass.

    Example with two candidates: the matrix has "the" → cat, dog and "cat" → sat, is. After "the", the tree with the
    nodes (1), (2), (1, 1) is cat, dog, and sat below cat. If the verifier answers "cat" after "the" and "ran" after
    "cat", cat is accepted. The logits after "the", "cat", "dog" and "sat" replace these four rows of the matrix.

    The matrix takes 4 k bytes per token of the vocabulary: with k = 8, 1.6 MB for 49,152 tokens (SmolLM2) and 4.9 MB
    for 151,936 (Qwen3).

    num_tokens: tokens of the tree, at most 63. auto: the same tree of 63 tokens, of which every step verifies those
        that are worth their rows (`TreePruning`), by the measured time of a pass and the recent acceptance rate per
        depth and rank
    candidates: k, next tokens kept per token
    depth: most tokens of a path
    memory: prompt: every sequence begins with an empty matrix. session: the matrix is kept from sequence to sequence,
        as in the paper, so that drafts depend on what was decoded before, also on earlier decodes of the same prompt. A
        continued run knows the earlier sequences' tokens, but not their logits
    """

    @validate_call
    def __init__(
        self,
        num_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | Literal["auto"] = "auto",
        candidates: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 8,
        depth: PositiveInt = 6,
        memory: Literal["prompt", "session"] = "prompt",
    ) -> None:
        self.memory = memory
        self._tree = static_tree(MOST_TOKENS if num_tokens == "auto" else num_tokens, candidates, depth)
        self._matrix = AdjacencyMatrix(candidates)
        self._pruning = TreePruning(FREE_ROWS) if num_tokens == "auto" else None
        self._last = 0

    @property
    def chooses_size(self) -> bool:
        return self._pruning is not None

    def prepare(self, resources: Resources) -> None:
        """Measure the passes of the verifier if the number of tokens is chosen automatically."""
        if self._pruning is not None:
            self.use(resources.pass_cost)

    def use(self, cost: PassCost) -> None:
        """Choose the number of tokens by these times of a pass. Without this, rows count as free."""
        self._pruning = TreePruning(cost)

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        self._matrix.clear()
        if self.memory == "session":
            for sequence in finished:
                self._matrix.add_text(sequence.prompt + sequence.output)

    def begin(self, prompt: Tensor) -> None:
        if self.memory == "prompt":
            self._matrix.clear()
        self._matrix.add_text(prompt.tolist())

    def propose(self, context: Context, budget: int) -> Draft:
        self._last = context.last
        tree = self._filled(context.last, budget)
        if self._pruning is None:
            return Draft(list(tree.tokens), list(tree.parents))
        return Draft(*self._pruning.prune(tree, len(context.tokens) - 1))

    def observe(self, step: StepResult) -> None:
        """Replace the candidates of all tokens of the pass. Of several rows of a token, accepted ones count."""
        rows = [self._last, *step.draft.tokens]
        likely = step.logits.topk(min(self._matrix.width, step.logits.shape[-1])).indices.tolist()
        accepted = [0, *(node + 1 for node in step.path)]
        for row in [*range(len(rows)), *accepted]:
            self._matrix.replace(rows[row], likely[row])
        if self._pruning is not None:
            self._pruning.add(step)

    def _filled(self, last: int, deepest: int) -> Candidates:
        """Return the tree with its tokens after ``last``, without nodes that the matrix knows no token for."""
        tokens: list[int] = []
        parents: list[int] = []
        kinds: list[Kind] = []
        place = {ROOT: ROOT}
        rows = {ROOT: self._matrix.row(last)}
        for index, node in enumerate(self._tree):
            if node.depth > deepest or node.parent not in place:
                continue
            token = rows[node.parent][node.rank]
            if token == UNKNOWN:
                continue
            place[index], rows[index] = len(tokens), self._matrix.row(token)
            tokens.append(token)
            parents.append(place[node.parent])
            kinds.append(Kind((node.depth, node.rank), assumed_rate(node.rank)))
        return Candidates(tokens, parents, kinds)


class AdjacencyMatrix:
    """The likely next tokens of every token, int32 [V, k]; ``UNKNOWN`` where there are fewer.

    The number of rows V grows with the largest token.

    width: k
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows = np.full((0, width), UNKNOWN, dtype=np.int32)

    def clear(self) -> None:
        self._rows[:] = UNKNOWN

    def row(self, token: int) -> list[int]:
        """Return the candidates of a token, the most likely first."""
        if token >= len(self._rows):
            return [UNKNOWN] * self.width
        found: list[int] = self._rows[token].tolist()
        return found

    def replace(self, token: int, candidates: Sequence[int]) -> None:
        """Set the candidates of a token, at most ``width``, the most likely first."""
        if token >= len(self._rows):
            grown = np.full((max(token + 1, 2 * len(self._rows)), self.width), UNKNOWN, dtype=np.int32)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        self._rows[token] = UNKNOWN
        self._rows[token, : len(candidates)] = candidates

    def add_text(self, tokens: Sequence[int]) -> None:
        """Put every token first among the candidates of the token before it."""
        for token, following in pairwise(tokens):
            others = [other for other in self.row(token) if other not in (following, UNKNOWN)]
            self.replace(token, [following, *others][: self.width])


@dataclass(frozen=True)
class Node:
    """A node of the static tree. parent: index of its parent or ROOT; rank: which candidate it is, from 0 on"""

    parent: int
    rank: int
    depth: int


def assumed_rate(rank: int) -> float:
    """Return the assumed acceptance rate of the candidate with this rank (0 for the most likely): (rank + 1)^-1.5 / 2.

    The rates of the first eight candidates are together 0.96: they contain the right token nearly always.
    """
    return 0.5 * (rank + 1) ** -1.5


@functools.lru_cache(maxsize=16)
def static_tree(size: int, candidates: int, depth: int) -> list[Node]:
    """Return the tree of ``size`` tokens with the highest expected number of accepted tokens, parents first.

    The paper's tree has 80 nodes, 6 levels and 8 candidates, and was chosen by the same criterion on measured
    acceptance; passes here have at most 64 rows. Without measurements of the model at hand, a token of rank r is taken
    to be accepted with probability `assumed_rate` (r) if its parent is. The probability of a node is the product along
    its path, so that adding the most probable node whose parent is in the tree maximizes the sum for every size.

    Example: with the rates 0.5, 0.18, 0.1 of three candidates, the first nodes are (1) 0.5, (1, 1) 0.25, (2) 0.18,
    (1, 1, 1) 0.125, (3) 0.096, each named by the ranks along its path.
    """
    nodes: list[Node] = []
    reachable = [(-assumed_rate(0), 0, Node(ROOT, 0, 1))]
    added = 1

    def reach(probability: float, node: Node) -> None:
        nonlocal added
        heapq.heappush(reachable, (-probability, added, node))
        added += 1

    while reachable and len(nodes) < size:
        negative, _, node = heapq.heappop(reachable)
        nodes.append(node)
        if node.rank + 1 < candidates:
            sibling = Node(node.parent, node.rank + 1, node.depth)
            reach(-negative / assumed_rate(node.rank) * assumed_rate(sibling.rank), sibling)
        if node.depth < depth:
            reach(-negative * assumed_rate(0), Node(len(nodes) - 1, 0, node.depth + 1))
    return nodes
