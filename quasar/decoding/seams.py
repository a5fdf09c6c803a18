"""The methods that the decode loop calls on a drafter and on a verifier.

The base classes `quasar.drafters.base.Drafter` and `quasar.verifiers.base.Verifier` document these methods and declare
the others that a run needs. The loop does not import them, because both packages are built on top of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from quasar.decoding.draft import Context, Draft, StepResult
from quasar.decoding.scores import Scores


class Drafting(Protocol):
    def begin(self, prompt: Tensor) -> None: ...

    def propose(self, context: Context, budget: int) -> Draft: ...

    def observe(self, step: StepResult) -> None: ...


class Verifying(Protocol):
    device: torch.device

    def prefill(self, tokens: Tensor) -> Scores: ...

    def verify(self, last: int, draft: Draft) -> Scores: ...

    def keep(self, path: Sequence[int]) -> None: ...
