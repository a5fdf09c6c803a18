"""The base class of all drafters. Its methods do nothing by default, so a drafter implements only what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.drafters._pass_cost import PassCost, measure_pass_cost
from quasar.verifiers.base import LayeredVerifier, Verifier

if TYPE_CHECKING:
    from quasar.quantization.statistics import Calibration


TIMED_TEXT = "Say hello, hello, hello."
"""The beginning of the sequence whose passes are timed. It has few tokens, and their number matters little."""


@dataclass(frozen=True)
class Resources:
    """The objects that a run gives to a drafter before the first sequence.

    verifier: the run's verifier
    encode: returns the token ids of plain text
    build_verifier: builds another verifier of the run's model, given a name in conf/verifier or the content of such a
        file. The model's weights are loaded again, with the run's dtype if ``dtype`` is auto
    calibration: returns text that is not evaluated, or None if the run has none
    identity: model, verifier, dtype and device, as a key for results that are cached between runs
    progress: called with (done, total) during long preparations
    """

    verifier: Verifier
    encode: Callable[[str], list[int]]
    build_verifier: Callable[[str | dict[str, Any]], LayeredVerifier]
    calibration: Callable[[], Calibration | None]
    identity: dict[str, str]
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)

    @cached_property
    def pass_cost(self) -> PassCost:
        """Milliseconds of the verifier's passes by rows and context length. Measured on first use, which takes seconds.

        The verifier's cache contains another sequence afterwards.
        """
        return measure_pass_cost(self.verifier, self.encode(TIMED_TEXT), self.verifier.capacity)


@dataclass(frozen=True)
class FinishedSequence:
    """A sequence that an earlier attempt decoded.

    prompt: token ids
    output: the generated token ids that the drafter had seen when it made its last draft
    """

    prompt: list[int]
    output: list[int]


class Drafter:
    """Guesses the tokens that follow a context. Only `propose` must be implemented.

    details: sentences on what `prepare` decided beyond the configuration, for the run's header and environment.json
    rule:    an acceptance rule of the drafter, or None to use the run's rule. Such a rule has ``simulated = True``: the
             measured times are real, but the text is not
    devices: types of devices that it drafts on
    simulates: whether it always has such a rule, so that every run with it is a simulation
    weight_bytes: bytes of weights that drafting one token reads, 0 without a model; None if that varies
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    simulates: ClassVar[bool] = False
    details: tuple[str, ...] = ()
    weight_bytes: int | None = 0

    @property
    def chooses_size(self) -> bool:
        """Whether the drafter chooses the size of its drafts by their cost itself, or its size has no effect on speed.

        ``decode.draft_tokens=auto`` chooses the draft length of all other drafters, see `_adaptive_length`.
        """
        return False

    @property
    def reads_verifier_cache(self) -> bool:
        """Whether `propose` reads the verifier's KV cache, which must then contain the context but for its last token.

        In the decode loop it always does. A drafter that drafts for another verifier inside of a step asks this.
        """
        return False

    @property
    def rule(self) -> AcceptanceRule | None:
        return None

    def prepare(self, resources: Resources) -> None:
        """Prepare the drafter. Called once, before the first sequence.

        Raises RequestError if the drafter cannot draft for the verifier.
        """

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        """Start the run's first prompt. Called once, after the warm-up, whose sequences must be forgotten.

        finished: the sequences that earlier attempts of the run decoded, in order. A drafter that learns from one
            prompt to the next takes them up, so that a continued run drafts like one that was never interrupted
        """

    def begin(self, prompt: Tensor) -> None:
        """Start a new sequence. The verifier has just read the prompt, int64 [P]."""

    def propose(self, context: Context, budget: int) -> Draft:
        """Return a draft for the current context, at most ``budget`` tokens deep (0 or more). It may be empty.

        A drafter that samples should draw by ``context.draw``: with coupled sampling, as the verifier does.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement propose(context, budget)")

    def observe(self, step: StepResult) -> None:
        """Learn from the result of the last draft. ``step.emitted`` is already part of the context."""

    def rewind(self, length: int) -> None:
        """Forget all tokens of the context behind the first ``length``, because they turned out not to stand.

        Called only if the context of a draft was itself a draft (see `quasar.drafters.cascade`): after `observe`, and
        before the next `propose`, whose context has these tokens and others behind them. A drafter that keeps nothing
        of the text need not implement it.
        """

    def notes(self) -> dict[str, list[int | float | str]]:
        """Return columns by name for the run's records, with one value per step since `begin`.

        A column of numbers is summarized by its mean. A column of text groups the steps by its values.
        """
        return {}
