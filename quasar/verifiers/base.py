"""The verifier's seam: what the decode loop and self-drafting drafters may ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


class Verifier(ABC):
    """A model plus its KV cache. The cache holds the context without its last token, which `verify` feeds.

    label:          how tables name what the output is lossless with respect to
    is_reference:   whether this is the unquantized, unpruned model
    details:        what building it settled beyond the configuration, in words
    cost:           bytes that one pass reads
    device, dtype:  of the activations
    context_length: tokens that the model can read
    """

    label: str = "model"
    is_reference: bool = False
    details: tuple[str, ...] = ()
    cost: VerifierCost
    device: torch.device
    dtype: torch.dtype
    context_length: int

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Scores:
        """Forget the last sequence and read a prompt, int64 [P]; the scores after its last token, of no draft."""

    @abstractmethod
    def verify(self, last: int, draft: Draft) -> Scores:
        """Score a draft, which follows ``last``, and its scratch outputs in one forward pass."""

    @abstractmethod
    def keep(self, path: Sequence[int]) -> None:
        """Commit the last token and the accepted draft tokens ``path``; drop every other row of the pass."""

    @abstractmethod
    def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
        """Logits, float [S - first, V], after each of the tokens, int64 [S], from index ``first`` on, in one pass.

        Leaves the sequence that the KV cache holds alone.
        """

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache has room for before it has to grow."""
        return self.context_length


class LayeredVerifier(Verifier):
    """A verifier whose own layers can draft (self-speculation)."""

    @property
    @abstractmethod
    def num_layers(self) -> int: ...

    @abstractmethod
    def draft_logits(self, token: int, offset: int, layers: Sequence[int]) -> Tensor:
        """Logits [V] after ``token`` at ``offset`` tokens behind the cached context, through ``layers`` only.

        The layers' keys and values of the drafted tokens are tentative: `verify` writes over them.
        """

    @abstractmethod
    def share_cache(self, owner: LayeredVerifier) -> None:
        """Read and write the owner's KV cache from now on: the same layers, in another precision, draft for it.

        Raises RequestError if the layers' keys and values have other shapes or types.
        """


@dataclass(frozen=True)
class Setup:
    """What a run gives to every verifier it builds.

    capacity: tokens the KV cache has room for at first
    folder: where the model's files are; None for random weights
    identity: names the model, so that what is prepared of it can be kept between runs; None: nothing is kept
    progress: called with (done, total) while weights are transformed
    calibration: gives the text on which methods watch the model's activations, or None where the run has none
    """

    capacity: int = 1024
    folder: Path | None = None
    identity: str | None = None
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    calibration: Callable[[], Calibration | None] = field(default=lambda: None)

    def calibration_for(self, choice: str) -> Calibration:
        """The calibration text. Raises RequestError where there is none, naming the ``key=value`` that needs it."""
        calibration = self.calibration()
        if calibration is None:
            raise RequestError(f"{choice} needs calibration text; set calibration.prompts above 0")
        return calibration
