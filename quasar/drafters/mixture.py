"""One draft tree from several sources of next tokens, whose acceptance rates are estimated during decoding."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field, validate_call
from torch import Tensor

from quasar.decoding.draft import MAX_ROWS, ROOT, Context, Draft, StepResult
from quasar.drafters._next_tokens import SOURCES, Evidence, NextTokens
from quasar.drafters._pass_cost import FREE_ROWS, PassCost
from quasar.drafters._tree_size import Candidates, Kind, RelatedRates, TreePruning
from quasar.drafters.base import Drafter, FinishedSequence, Resources

LEAST_PROBABILITY = 0.02
"""Tokens with a lower estimated probability are not considered. This bounds the drafting time where rows are free."""
ASSUMED_TRIES = 12.0
"""Weight of a kind's assumed rate in tries. There are many kinds, and most of them are tried rarely."""

Source = Literal["text", "logits", "runners_up"]


class MixtureDrafter(Drafter):
    """Mixes suffix matches of several lengths with the verifier's own earlier guesses in one calibrated tree.

    Each source suggests next tokens (`NextTokens`): ``text`` those that came next after earlier occurrences of the last
    n tokens, for n from ``order`` to 1, as in prompt lookup; ``logits`` the most likely ones in the last pass over the
    same n tokens, as in Token Recycling; ``runners_up`` those that were likely in place of the last token, as in
    LogitSpec. What the sources say of a token (source, the largest n, place in its list) is its kind, and every kind
    has a running acceptance rate, so that tokens on which sources agree have a rate of their own. The draft is the tree
    of the most probable tokens by the product of the rates along the path. It ends where a further token is not worth
    its row by the measured time of a pass (`TreePruning`): where rows are expensive and nothing is likely, there is no
    draft.

    Example: the context is "the cat sat . the". The text suggests cat (n = 1, rate 0.5). After "the cat" it suggests
    sat (n = 2, rate 0.8), so that sat has the probability 0.4. If the last pass over "the" found dog second with rate
    0.2, the candidates are cat 0.5, sat 0.4 and dog 0.2. If a row costs 10 % of a pass, each is worth its row.

    num_tokens: most tokens per draft, at most 63
    order: most tokens of a context
    candidates: tokens that are kept per context and source
    sources: names of the sources
    memory: prompt: every sequence begins without knowledge. session: what was learnt is kept from sequence to sequence,
        so that drafts depend on what was decoded before, also on earlier decodes of the same prompt. A continued run
        knows the earlier sequences' tokens, but not their logits. The rates are kept in both cases
    """

    @validate_call
    def __init__(
        self,
        num_tokens: Annotated[int, Field(ge=1, le=MAX_ROWS - 1)] = MAX_ROWS - 1,
        order: Annotated[int, Field(ge=1, le=16)] = 6,
        candidates: Annotated[int, Field(ge=1, le=MAX_ROWS - 1)] = 8,
        sources: Annotated[Sequence[Source], Field(min_length=1)] = ("text", "logits", "runners_up"),
        memory: Literal["prompt", "session"] = "prompt",
    ) -> None:
        self.num_tokens, self.order, self.candidates, self.memory = num_tokens, order, candidates, memory
        self._sources: list[NextTokens] = [SOURCES[name](order, candidates) for name in dict.fromkeys(sources)]
        self._pruning = TreePruning(FREE_ROWS, RelatedRates(ASSUMED_TRIES))
        self._read = 0
        self._tail: tuple[int, ...] = ()
        if memory == "session":
            self.details = ("remembers the earlier sequences of the run (drafter.memory=session)",)

    @property
    def chooses_size(self) -> bool:
        return True

    def prepare(self, resources: Resources) -> None:
        self.use(resources.pass_cost)

    def use(self, cost: PassCost) -> None:
        """Weigh tokens against these times of a pass. Without this, rows count as free."""
        self._pruning = TreePruning(cost, RelatedRates(ASSUMED_TRIES))

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        self._clear()
        if self.memory == "session":
            for sequence in finished:
                for source in self._sources:
                    source.read(sequence.prompt + sequence.output, 0)

    def begin(self, prompt: Tensor) -> None:
        if self.memory == "prompt":
            self._clear()
        self._read = 0

    def propose(self, context: Context, budget: int) -> Draft:
        for source in self._sources:
            source.read(context.tokens, self._read)
        self._read = len(context.tokens)
        self._tail = tuple(context.tokens[-self.order :])
        cached = len(context.tokens) - 1
        return Draft(*self._pruning.prune(self._tree(budget, self._pruning.row_cost(cached)), cached))

    def observe(self, step: StepResult) -> None:
        """Learn from every row of the pass, and count what was accepted."""
        likely = step.logits.topk(min(self.candidates, step.logits.shape[-1])).indices.tolist()
        contexts = {ROOT: self._tail}
        for node, (token, parent) in enumerate(zip(step.draft.tokens, step.draft.parents, strict=True)):
            contexts[node] = (*contexts[parent], token)[-self.order :]
        # Rows of the accepted path come last, because they replace what other rows say after the same tokens.
        accepted = {ROOT, *step.path}
        for node in sorted(contexts, key=lambda node: (node in accepted, node)):
            for source in self._sources:
                source.score(contexts[node], likely[node + 1])
        self._pruning.add(step)

    def rewind(self, length: int) -> None:
        """Read the tokens behind the first ``length`` anew. What came next before stays known, as one more guess."""
        self._read = min(self._read, length)

    def _tree(self, deepest: int, row_cost: float) -> Candidates:
        """Return the most probable tokens, best first, with at most ``deepest`` tokens per path.

        The last of them is the first that is not worth its row. Nothing behind it is looked up.
        """
        tokens: list[int] = []
        parents: list[int] = []
        kinds: list[Kind] = []
        # Entries are (-probability, order, parent, depth, context before the token, token, kind); order decides ties.
        reachable: list[tuple[float, int, int, int, tuple[int, ...], int, Kind]] = []
        added = 0
        expected, time = 1.0, 1.0

        def reach(probability: float, parent: int, depth: int, context: tuple[int, ...]) -> None:
            nonlocal added
            for token, kind in self._suggestions(context):
                product = probability * self._pruning.rate(kind)
                if product >= LEAST_PROBABILITY:
                    heapq.heappush(reachable, (-product, added, parent, depth, context, token, kind))
                    added += 1

        if deepest > 0:
            reach(1.0, ROOT, 1, self._tail)
        while reachable and len(tokens) < self.num_tokens:
            negative, _, parent, depth, context, token, kind = heapq.heappop(reachable)
            tokens.append(token)
            parents.append(parent)
            kinds.append(kind)
            if -negative * time < row_cost * expected:
                break
            expected, time = expected - negative, time + row_cost
            if depth < deepest:
                reach(-negative, len(tokens) - 1, depth + 1, (*context, token)[-self.order :])
        return Candidates(tokens, parents, kinds)

    def _suggestions(self, context: tuple[int, ...]) -> Iterable[tuple[int, Kind]]:
        """Return every suggested token once, with its kind: the evidence of all sources that suggest it."""
        found: dict[int, tuple[Evidence, ...]] = {}
        for source in self._sources:
            for token, evidence in source.suggest(context).items():
                found[token] = (*found.get(token, ()), evidence)
        return [(token, _kind(evidence)) for token, evidence in found.items()]

    def _clear(self) -> None:
        for source in self._sources:
            source.clear()


@functools.cache
def _kind(evidence: tuple[Evidence, ...]) -> Kind:
    """Return the kind of a token on which these sources agree. The odds of the first one are multiplied by the gains.

    Example: odds of 0.1 and a gain of 3 are the odds 0.3, which is a rate of 0.23.
    """
    first, *others = evidence
    odds = first.odds * math.prod(other.gain for other in others)
    return Kind(tuple(part for one in evidence for part in one.key), odds / (1 + odds))
