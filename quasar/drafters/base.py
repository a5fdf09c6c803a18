"""The drafter's seam: a base class whose defaults do nothing, so that a drafter writes only what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.verifiers.base import LayeredVerifier, Verifier

if TYPE_CHECKING:
    from quasar.quantization.statistics import Calibration


@dataclass(frozen=True)
class Resources:
    """What a run gives to a drafter before the first sequence.

    verifier: the run's own verifier
    encode: token ids of plain text
    build_verifier: one more verifier of the run's model. Takes a name of conf/verifier or such a file's content; the
        model's weights are loaded anew, in the run's dtype where ``dtype`` is auto
    calibration: text that is none of the evaluation's, or None where the run has none
    identity: names model, verifier, precision and device, for what is cached between runs
    progress: called with (done, total) while something is prepared that takes long
    """

    verifier: Verifier
    encode: Callable[[str], list[int]]
    build_verifier: Callable[[str | dict[str, Any]], LayeredVerifier]
    calibration: Callable[[], Calibration | None]
    identity: dict[str, str]
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)


class Drafter:
    """Guesses the tokens that follow a context. Only `propose` has to be written; the rest does nothing by default.

    details: what `prepare` settled beyond the configuration, in words, for the run's header and environment.json
    rule:    the drafter's own acceptance rule, or None to leave acceptance to the run. A drafter that decides what is
             accepted makes the run a simulation: the times of its steps are real, its text is not
    """

    details: tuple[str, ...] = ()

    @property
    def rule(self) -> AcceptanceRule | None:
        return None

    def prepare(self, resources: Resources) -> None:
        """Called once, before the first sequence. Raises RequestError if the drafter cannot draft for the verifier."""

    def begin(self, prompt: Tensor) -> None:
        """A new sequence starts; the verifier has just read the prompt, int64 [P]."""

    def propose(self, context: Context, budget: int) -> Draft:
        """A draft at most ``budget`` tokens deep (0 or more) for the current context; an empty one is fine."""
        raise NotImplementedError(f"{type(self).__name__} does not implement propose(context, budget)")

    def observe(self, step: StepResult) -> None:
        """What became of the last draft; ``step.emitted`` is already part of the context."""

    def notes(self) -> dict[str, list[int | float | str]]:
        """Columns by name for the run's records, each with one value per step since `begin`. Text groups steps."""
        return {}
