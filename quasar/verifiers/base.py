"""The verifier's seam: what the decode loop and self-drafting drafters may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.errors import RequestError
from quasar.quantization.statistics import Calibration


@dataclass(frozen=True)
class VerifierCost:
    """Bytes that one verification pass has to read.

    weight_bytes: every weight once, in the format in which it is stored; of the embedding only a tied head
    kv_bytes_per_token: keys and values of all layers for one token of context
    """

    weight_bytes: int
    kv_bytes_per_token: int


class Verifier(Protocol):
    """A model plus its KV cache. The cache holds the context without its last token, which `verify` feeds."""

    cost: VerifierCost

    @property
    def device(self) -> torch.device: ...

    def prefill(self, tokens: Tensor) -> Scores:
        """Forget the last sequence and read a prompt, int64 [P]; the scores after its last token, of no draft."""
        ...

    def verify(self, last: int, draft: Draft) -> Scores:
        """Score a draft, which follows ``last``, and its scratch outputs in one forward pass."""
        ...

    def keep(self, path: Sequence[int]) -> None:
        """Commit the last token and the accepted draft tokens ``path``; drop every other row of the pass."""
        ...


@runtime_checkable
class LayeredVerifier(Protocol):
    """A verifier whose own layers can draft (self-speculation)."""

    @property
    def num_layers(self) -> int: ...

    def draft_logits(self, token: int, offset: int, layers: Sequence[int]) -> Tensor:
        """Logits [V] after ``token`` at ``offset`` tokens behind the cached context, through ``layers`` only.

        The layers' keys and values of the drafted tokens are tentative: `verify` writes over them.
        """
        ...


@dataclass(frozen=True)
class Setup:
    """What a run gives to every verifier it builds.

    capacity: tokens the KV cache has room for at first
    progress: called with (done, total) while weights are transformed
    calibration: gives the text on which methods watch the model's activations, or None where the run has none
    """

    capacity: int = 1024
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    calibration: Callable[[], Calibration | None] = field(default=lambda: None)

    def calibration_for(self, choice: str) -> Calibration:
        """The calibration text. Raises RequestError where there is none, naming the ``key=value`` that needs it."""
        calibration = self.calibration()
        if calibration is None:
            raise RequestError(f"{choice} needs calibration text; set calibration.prompts above 0")
        return calibration
