"""Drafts with a separate model: any verifier with the same vocabulary and its own KV cache."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt, validate_call
from torch import Tensor

from quasar.config.component import checked_component
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.drafters._autoregressive import draft_chain
from quasar.drafters.base import Drafter, Resources
from quasar.verifiers.base import LayeredVerifier


def _verifier_node(node: dict[str, Any]) -> dict[str, Any]:
    # A drafter that gets its model by `use` has an empty node.
    return checked_component("verifier", node, "drafter.draft") if node else node


class ModelDrafter(Drafter):
    """Speculative decoding with a draft model (Leviathan et al. 2023; Chen et al. 2023).

    The draft model reads the prompt during the prefill. Its cache keeps the keys and values of the accepted draft
    tokens. The first pass of a draft reads all tokens that the model has not read yet. The cost per step is
    ``num_tokens`` passes of the draft model.

    draft: node of a verifier: the run's model in another precision or pruned, or another checkpoint with the same
        vocabulary (verifier ``packed``)
    num_tokens: maximum number of tokens per draft
    confidence: a draft ends with the first token whose probability is lower
    """

    @validate_call
    def __init__(
        self,
        draft: Annotated[dict[str, Any], AfterValidator(_verifier_node)],
        num_tokens: PositiveInt = 4,
        confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        self.draft, self.num_tokens, self.confidence = draft, num_tokens, confidence
        self._model: LayeredVerifier | None = None
        self._read = 0
        self._unread = 0
        self._proposed = 0

    def prepare(self, resources: Resources) -> None:
        """Build the draft model."""
        model = resources.build_verifier(self.draft)
        self.details = (f"draft model of {model.cost.weight_bytes / 1e6:.0f} MB per pass", *model.details)
        self.use(model)

    def use(self, model: LayeredVerifier) -> None:
        """Draft with this model from now on."""
        self._model = model
        self.weight_bytes = model.cost.weight_bytes

    def begin(self, prompt: Tensor) -> None:
        if self._model is None:
            raise RuntimeError("ModelDrafter.begin: there is no draft model yet; call prepare or use first")
        self._model.prefill(prompt)
        self._read = len(prompt)
        self._proposed = 0

    def propose(self, context: Context, budget: int) -> Draft:
        unread = context.tokens[self._read :]
        draft = draft_chain(partial(self._logits, unread), context, min(self.num_tokens, budget), self.confidence)
        self._unread, self._proposed = len(unread), len(draft)
        return draft

    def observe(self, step: StepResult) -> None:
        if not self._proposed:
            return
        assert self._model is not None
        # The cache contains the unread tokens and all draft tokens except the last one; keep the accepted ones.
        accepted = min(len(step.path), self._proposed - 1)
        self._model.keep(range(self._unread - 1 + accepted))
        self._read += self._unread + accepted
        self._proposed = 0

    def rewind(self, length: int) -> None:
        if self._model is not None and length < self._read:
            self._model.rewind(length)
            self._read = length

    def _logits(self, unread: list[int], token: int, offset: int) -> Tensor:
        """Return the logits [V] after the draft token at ``offset``; offset 0 is the last of the unread tokens."""
        assert self._model is not None
        if offset == 0 and len(unread) > 1:
            return self._model.verify(unread[0], Draft.chain(unread[1:])).logits[-1]
        return self._model.draft_logits(token, len(unread) - 1 + offset, range(self._model.num_layers))
