"""The base classes of all verifiers: every method that the decode loop, drafters and runs may call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.errors import RequestError
from quasar.quantization.statistics import Calibration


@dataclass(frozen=True)
class VerifierCost:
    """Bytes that one verification pass has to read.

    weight_bytes: bytes of every weight in its storage format; the embedding counts only if it is tied to the head
    kv_bytes_per_token: bytes of keys and values of all layers for one token of context
    """

    weight_bytes: int
    kv_bytes_per_token: int


class Verifier(ABC):
    """A model and its KV cache. The cache contains the context without its last token, which `verify` takes.

    label:          name of the model in sentences such as "lossless with respect to the INT8 model"
    is_reference:   whether this is the unquantized, unpruned model
    rows_are_independent: whether a token's logits depend on the sequence before it alone, bit for bit, and not on the
                    other rows of the pass. Only then does speculative output equal autoregressive output
    details:        sentences on what was decided beyond the configuration while it was built
    cost:           bytes that one pass reads
    emulated:       whether this device lacks the instructions of the weights' format: its times then say nothing
    device, dtype:  device and dtype of the activations
    context_length: maximum number of tokens that the model can read
    devices:        types of devices that it can be built on
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    label: str = "model"
    is_reference: bool = False
    rows_are_independent: bool = True
    details: tuple[str, ...] = ()
    cost: VerifierCost
    emulated: bool = False
    device: torch.device
    dtype: torch.dtype
    context_length: int

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Scores:
        """Clear the cache and read a prompt, int64 [P]; return the scores after its last token, without a draft."""

    @abstractmethod
    def verify(self, last: int, draft: Draft) -> Scores:
        """Score the tokens and scratch outputs of a draft after the token ``last`` in one forward pass."""

    @abstractmethod
    def keep(self, path: Sequence[int]) -> None:
        """Keep the last token and the accepted draft tokens ``path`` in the cache; drop all other rows of the pass."""

    @abstractmethod
    def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
        """Return the logits, float [S - first, V], after each of ``tokens``, int64 [S], from index ``first`` on.

        This takes one pass and does not use the KV cache.
        """

    @property
    def capacity(self) -> int:
        """Number of tokens that fit the KV cache before it has to grow."""
        return self.context_length


class LayeredVerifier(Verifier):
    """A verifier whose layers can also draft (self-speculation)."""

    @property
    @abstractmethod
    def num_layers(self) -> int: ...

    @abstractmethod
    def draft_logits(self, token: int, offset: int, layers: Sequence[int]) -> Tensor:
        """Return the logits [V] after ``token``, ``offset`` tokens after the cached context, using only ``layers``.

        The keys and values of the draft tokens are tentative: `verify` overwrites them.
        """

    def draft_bytes(self, layers: Sequence[int]) -> int | None:
        """Return the bytes of weights that `draft_logits` reads for a token; None if they are unknown."""
        return None

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Keep only the first ``length`` tokens in the cache. Raises ValueError if it has fewer."""

    def share_weights(self, owner: Verifier) -> int:
        """Use the owner's tensors for the weights that both have in common; return how many bytes this saves."""
        return 0

    @abstractmethod
    def share_cache(self, owner: LayeredVerifier) -> None:
        """Use the owner's KV cache from now on, to draft for it with the same layers in another precision.

        Raises RequestError if the keys and values have other shapes or dtypes.
        """


@dataclass(frozen=True)
class Setup:
    """The objects that a run gives to every verifier it builds.

    capacity: initial size of the KV cache in tokens
    folder: folder of the model's files; None for random weights
    identity: identity of the model in cache keys; None if prepared weights are not cached
    progress: called with (done, total) while weights are transformed
    calibration: returns the text that activations are measured on, or None if the run has none
    """

    capacity: int = 1024
    folder: Path | None = None
    identity: str | None = None
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    calibration: Callable[[], Calibration | None] = field(default=lambda: None)

    def calibration_for(self, choice: str) -> Calibration:
        """Return the calibration text. Raises RequestError if there is none.

        choice: the ``key=value`` that needs the text, for the error message
        """
        calibration = self.calibration()
        if calibration is None:
            raise RequestError(f"{choice} needs calibration text; set calibration.prompts above 0")
        return calibration
