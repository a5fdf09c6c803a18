"""The drafter's seam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.verifiers.base import Verifier

if TYPE_CHECKING:
    from quasar.quantization.statistics import Calibration
    from quasar.verifiers.transformer import TransformerVerifier


class Drafter(Protocol):
    def begin(self, prompt: Tensor, verifier: Verifier) -> None:
        """A new sequence starts; the verifier has just read the prompt, int64 [P]."""
        ...

    def propose(self, context: Context, budget: int) -> Draft:
        """A draft at most ``budget`` tokens deep (0 or more) for the current context; an empty one is fine."""
        ...

    def observe(self, step: StepResult) -> None:
        """What became of the last draft; ``step.emitted`` is already part of the context."""
        ...


@dataclass(frozen=True)
class Resources:
    """What a run can give to a drafter that asks for it.

    verifier: the run's own verifier
    encode: token ids of plain text
    build_verifier: one more verifier of the run's model. Takes a name of conf/verifier or such a file's content; the
        model's weights are loaded anew, in the run's dtype where ``dtype`` is auto
    calibration: text that is none of the evaluation's, or None where the run has none
    identity: names model, verifier, precision and device, for what is cached between runs
    progress: called with (done, total) while something is prepared that takes long
    """

    verifier: TransformerVerifier
    encode: Callable[[str], list[int]]
    build_verifier: Callable[[str | dict[str, Any]], TransformerVerifier]
    calibration: Callable[[], Calibration | None]
    identity: dict[str, str]
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)


@runtime_checkable
class PreparedDrafter(Protocol):
    """A drafter that asks for resources, once and before its first sequence."""

    facts: tuple[str, ...]
    """What preparing it settled beyond the configuration, for people."""

    def prepare(self, resources: Resources) -> None: ...


@runtime_checkable
class NotingDrafter(Protocol):
    """A drafter that keeps notes of its own, a value per step, which the records carry beside the counts."""

    def notes(self) -> dict[str, list[int | float | str]]:
        """Columns by name, each with one value per step since `begin`. Text groups steps in reports."""
        ...


@runtime_checkable
class SimulatingDrafter(Protocol):
    """A drafter that also decides what is accepted: the times of its steps are real, its text is not."""

    @property
    def rule(self) -> AcceptanceRule: ...
