"""What the decode loop asks of a drafter and of a verifier.

Their base classes, `quasar.drafters.base.Drafter` and `quasar.verifiers.base.Verifier`, say what each method means and
hold what a run needs besides. The loop imports neither, so that both can be built on what decoding offers.
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
