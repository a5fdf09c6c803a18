"""Drafters that end their job in ways that a drafter should not."""

from __future__ import annotations

import os
import signal

from torch import Tensor

from quasar.drafters.none import NoneDrafter


class _Sabotaged(NoneDrafter):
    """Ends a run at its second prompt, after the warm-up and one prompt."""

    def __init__(self) -> None:
        self._prompts: set[tuple[int, ...]] = set()

    def begin(self, prompt: Tensor) -> None:
        self._prompts.add(tuple(prompt.tolist()))
        if len(self._prompts) > 2:
            self.end()

    def end(self) -> None:
        raise NotImplementedError


class KilledDrafter(_Sabotaged):
    """Kills the process as the out-of-memory killer of the operating system does."""

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailingDrafter(_Sabotaged):
    """Raises an unexpected error."""

    def end(self) -> None:
        raise ZeroDivisionError("sabotage")
