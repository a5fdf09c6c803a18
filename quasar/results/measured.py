"""What the metrics of a run are computed from: the records of its prompts, and facts about the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from quasar.results.schema import PHASES, ForcedAnswer, PassRecord, PromptRecord, Turn


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run that metrics need in addition to its records.

    model, drafter, verifier, data: its name in the configuration
    temperature: of sampling; 0 for greedy decoding
    model_origin: where the reference's weights come from
    weights_on_grid: share of these weights that are exactly on a 4-bit or 8-bit grid; None for random weights
    verifier_label: description of the verifier's model
    is_reference: whether the verifier is the reference
    weight_bytes: bytes of weights that every verification pass reads
    kv_bytes_per_token: bytes of keys and values that a pass reads per token of context
    draft_weight_bytes: bytes of weights that drafting one token reads, see `quasar.drafters.base.Drafter`
    peak_memory_bytes: most memory that the run has used, of the GPU if it ran on one
    device: kind and name of the processor or GPU
    copy_bandwidth: bytes per second, see `quasar_kernels.bandwidth.copy_bandwidth`
    simulated: whether acceptance was replayed, so that the generated text is meaningless
    lossy: whether the acceptance rule does not preserve the verifier's distribution
    sandbox: what isolates the generated code that is graded; None if none is executed
    dtype: dtype of the verifier's activations and logits, such as bfloat16
    rows_are_independent: see `quasar.verifiers.base.Verifier`
    other_cpu_share: the share that other processes took of the cores that the run uses, see `quasar.results.load`; None
        if it was not measured
    emulated: whether the device emulates the verifier's number format, so that its times say nothing about it
    """

    model: str
    drafter: str
    verifier: str
    data: str
    temperature: float
    verifier_label: str
    is_reference: bool
    weight_bytes: int
    kv_bytes_per_token: int
    copy_bandwidth: float
    peak_memory_bytes: int
    device: str
    simulated: bool
    lossy: bool
    model_origin: str
    weights_on_grid: float | None
    sandbox: str | None = None
    dtype: str = "float32"
    rows_are_independent: bool = True
    other_cpu_share: float | None = None
    emulated: bool = False
    draft_weight_bytes: int | None = 0


class Measured:
    """The records that metrics are computed from, and sums over them. `add` adds one record.

    records: the records of finished prompts
    steps: number of steps in all turns
    drafted: draft tokens in these steps
    accepted: draft tokens that were accepted
    emitted: tokens that the steps emitted
    context: sum over the steps of the cached tokens that the pass read
    passes: the passes that the run has timed, none if it was not asked to
    """

    def __init__(
        self,
        records: Iterable[PromptRecord] = (),
        facts: RunFacts | None = None,
        passes: Sequence[PassRecord] = (),
    ) -> None:
        self.records: list[PromptRecord] = []
        self.steps = self.drafted = self.accepted = self.emitted = self.context = 0
        self.passes = passes
        self._facts = facts
        self._phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
        for record in records:
            self.add(record)

    def add(self, record: PromptRecord) -> None:
        self.records.append(record)
        for turn in record.turns:
            self.steps += len(turn.steps.emitted)
            self.drafted += sum(turn.steps.drafted)
            self.accepted += sum(turn.steps.accepted)
            self.emitted += sum(turn.steps.emitted)
            self.context += sum(turn.steps.context)
            for phase, sums in self._phases.items():
                sums.append(phase_ms(turn, phase))

    @property
    def facts(self) -> RunFacts:
        """The facts about the run. Raises ValueError if this object was built from records alone."""
        if self._facts is None:
            raise ValueError("this metric needs facts about the whole run; records alone are not enough")
        return self._facts

    @property
    def emulated(self) -> bool:
        """Whether times say nothing about the verifier; no speedup is computed from them."""
        return self._facts is not None and self._facts.emulated

    @property
    def repetitions(self) -> int:
        """The number of times that each prompt was decoded."""
        return len({record.repetition for record in self.records})

    @property
    def turns(self) -> list[Turn]:
        return [turn for record in self.records for turn in record.turns]

    @property
    def answers(self) -> list[ForcedAnswer]:
        """The reference's answers that fidelity was measured on."""
        return [answer for record in self.records for answer in record.fidelity]

    def milliseconds(self, *phases: str) -> float:
        return sum(sum(self._phases[phase]) for phase in phases)

    def of_family(self, family: str) -> Measured:
        """Return the prompts of one task family in the same run."""
        return Measured([record for record in self.records if record.family == family], self._facts, self.passes)


def phase_ms(turn: Turn, phase: str) -> float:
    """Return the time of a phase of `quasar.results.schema.PHASES` in a turn, in milliseconds."""
    return float(np.sum(getattr(turn.milliseconds, phase)))
