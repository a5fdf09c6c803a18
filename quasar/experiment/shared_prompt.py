"""A verifier that reads a prompt only once, for several decodings of the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.verifiers.base import LayeredVerifier, Verifier


class SharedPrompt:
    """Passes everything on to a verifier, but rewinds its cache if the same prompt is to be read again.

    The decodings that follow the first one then find the very keys and values that the first one computed. Nobody else
    may use the verifier's cache in between. A verifier that cannot rewind reads the prompt every time.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.device = verifier.device
        self._verifier = verifier
        self._prompt: Tensor | None = None
        self._logits = torch.empty(0)

    def prefill(self, tokens: Tensor) -> Scores:
        if self._prompt is not None and torch.equal(self._prompt, tokens) and self._rewind(len(tokens)):
            return Scores(self._logits)
        scores = self._verifier.prefill(tokens)
        scores.require_finite()
        self._prompt, self._logits = tokens, scores.logits.clone()
        return scores

    def verify(self, last: int, draft: Draft) -> Scores:
        return self._verifier.verify(last, draft)

    def keep(self, path: Sequence[int]) -> None:
        self._verifier.keep(path)

    def _rewind(self, length: int) -> bool:
        if not isinstance(self._verifier, LayeredVerifier):
            return False
        self._verifier.rewind(length)
        return True
