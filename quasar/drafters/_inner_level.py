"""The inner level of a cascade: a cheap verifier and a drafter, which decode a block of tokens speculatively."""

from __future__ import annotations

import torch
from torch import Tensor

from quasar.decoding.acceptance import rule_for
from quasar.decoding.draft import MAX_ROWS, Context, Draft, StepResult
from quasar.decoding.scores import Scores
from quasar.drafters.base import Drafter
from quasar.verifiers.base import LayeredVerifier


class InnerLevel:
    """A verifier and its drafter that decode behind a context which they have not read completely.

    The verifier's cache contains the first tokens of the context. The others, which another verifier has emitted, are
    rows of the next pass, before the rows of its draft.

    passes: number of passes of the last block
    hit: whether the last draft of ``drafter`` had tokens and all of them were accepted
    """

    def __init__(self, verifier: LayeredVerifier, drafter: Drafter) -> None:
        self.verifier, self.drafter = verifier, drafter
        self.passes = 0
        self.hit = False
        self._read = 0

    def begin(self, prompt: Tensor) -> None:
        self.verifier.prefill(prompt)
        self._read = len(prompt)
        self.hit = False
        self.drafter.begin(prompt)

    def unread(self, context: Context) -> int:
        """Return the number of tokens at the end of the context that are not in the verifier's cache, at least 1."""
        return len(context.tokens) - self._read

    def draft(self, context: Context, budget: int) -> Draft:
        """Return the draft of ``drafter``, which the inner verifier does not check."""
        if self.drafter.reads_verifier_cache:
            self._read_up_to(len(context.tokens) - 1, context)
        return self.drafter.propose(context, budget)

    def block(self, context: Context, size: int, budget: int) -> Draft:
        """Decode at least ``size`` and at most ``budget`` tokens; 1 <= size <= budget.

        Each token is drawn from the inner verifier's sampling distribution q after the tokens before it, and if
        decoding samples, the draft contains these distributions. A verifier that accepts the tokens by rejection
        sampling therefore emits tokens of its own distribution p (Leviathan et al. 2023; Chen et al. 2023), for this
        reason: no token that was drawn is dropped, and whether the block has a token at position i is decided before
        that token is drawn. A block ends with the first pass after which it has ``size`` tokens. This depends on which
        draft tokens were accepted before position i, but not on the token at position i, which the rest of the inner
        level's random numbers decide. So this token follows q, whatever is known about the block so far. The drafts of
        the last passes are shortened, so that a block never exceeds the budget and is never cut. With coupled sampling
        both levels use the same random numbers at a position, and no distributions are needed.
        """
        tokens = list(context.tokens)
        inner = Context(tokens, context.prompt_length, context.sampling, context.generator)
        rule, start = rule_for(context.sampling), len(tokens)
        distributions: list[Tensor] = []
        self.passes = 0
        while (done := len(tokens) - start) < size:
            draft = self.draft(inner, min(budget - done, MAX_ROWS) - 1)
            scores = self._verify(inner, draft)
            accepted = rule.accept(draft, scores, inner)
            scores.require_finite()
            self._keep(inner, accepted.path)
            emitted = [*(draft.tokens[node] for node in accepted.path), accepted.bonus]
            tokens += emitted
            distributions += accepted.targets
            self.hit = is_hit(draft, accepted.path)
            self.drafter.observe(StepResult(draft, emitted, accepted.path, scores.logits, scores.scratch))
            self.passes += 1
        return Draft.chain(tokens[start:], torch.stack(distributions) if distributions else None)

    def rewind(self, length: int) -> None:
        """Forget the tokens behind the first ``length`` of the context."""
        if length < self._read:
            self.verifier.rewind(length)
            self._read = length
        self.drafter.rewind(length)

    def _verify(self, context: Context, draft: Draft) -> Scores:
        """Score a draft in one pass, which also reads the unread tokens, and return the scores of the draft alone."""
        # Scratch rows attend to the first row of a pass, so this must be that of the last token.
        if draft.scratch is not None or self.unread(context) + len(draft) > MAX_ROWS:
            self._read_up_to(len(context.tokens) - 1, context)
        first, *others = context.tokens[self._read :]
        ahead = len(others)
        if not ahead:
            return self.verifier.verify(first, draft)
        parents = [*range(-1, ahead - 1), *(parent + ahead for parent in draft.parents)]
        scores = self.verifier.verify(first, Draft([*others, *draft.tokens], parents))
        return Scores(scores.logits[ahead:], None, lambda: scores.argmax()[ahead:], scores.require_finite)

    def _keep(self, context: Context, path: list[int]) -> None:
        ahead = self.unread(context) - 1
        self.verifier.keep([*range(ahead), *(ahead + node for node in path)])
        self._read += ahead + 1 + len(path)

    def _read_up_to(self, end: int, context: Context) -> None:
        while self._read < end:
            first, *others = context.tokens[self._read : min(end, self._read + MAX_ROWS)]
            self.verifier.verify(first, Draft.chain(others)).require_finite()
            self.verifier.keep(range(len(others)))
            self._read += 1 + len(others)


def is_hit(draft: Draft, path: list[int]) -> bool:
    """Whether a draft has tokens and the accepted ``path`` is as deep as the draft."""
    return 0 < len(path) == max(draft.depths(), default=0)
