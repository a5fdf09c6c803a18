"""Dataclasses for the lines of a run's files: `PromptRecord` in generations.jsonl and `PassRecord` in passes.jsonl.

Each line contains the version of this schema, so that a folder written by another version of the code is recognized
when it is opened. Increase `SCHEMA_VERSION` whenever a key of these classes is added or removed or changes its meaning.
What environment.json and status.json contain is in `quasar.results.attempt`, and the keys of summary.json are those of
the table in `quasar.results.metrics`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

Json = dict[str, Any]
"""A JSON object whose keys are not described by a dataclass."""

SCHEMA_VERSION = 4
VERSION_KEY = "schema_version"
CHECKSUM_KEY = "checksum"

Record = TypeVar("Record")


@dataclass(frozen=True)
class Steps:
    """The steps of a turn: every column has one entry per step.

    drafted: number of proposed tokens in all branches of the draft tree
    depth: length of the draft's longest path in tokens
    accepted: number of accepted draft tokens
    emitted: number of tokens that the step added to the answer, including the bonus token
    context: number of cached tokens that the verification pass read
    notes: additional columns of the drafter, by name; in the file they are keys next to the other columns
    """

    drafted: list[int]
    depth: list[int]
    accepted: list[int]
    emitted: list[int]
    context: list[int]
    notes: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in STEP_COUNTS:
            if len(getattr(self, name)) != len(self.drafted):
                raise ValueError(f"the columns drafted and {name} of a turn's steps differ in length")

    def to_json(self) -> Json:
        return {**{name: getattr(self, name) for name in STEP_COUNTS}, **self.notes}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Steps:
        notes = {name: column for name, column in content.items() if name not in STEP_COUNTS}
        return built(cls, {**content, "notes": notes})


STEP_COUNTS = ("drafted", "depth", "accepted", "emitted", "context")
"""The columns of `Steps` that every run has. All other columns are the drafter's notes."""


@dataclass(frozen=True)
class Milliseconds:
    """Durations by phase in milliseconds. ``prefill`` has one entry, the other phases have one entry per step."""

    prefill: list[float]
    draft: list[float]
    verify: list[float]
    overhead: list[float]
    observe: list[float]


PHASES = tuple(entry.name for entry in fields(Milliseconds))
DECODE_PHASES = PHASES[1:]
"""The phases of a step, which are all phases except the prefill."""


@dataclass(frozen=True)
class Timing:
    """Time of autoregressive decoding of one turn, without the prefill and its token, and the machine's host name."""

    decoded_tokens: int
    decode_ms: float
    machine: str


@dataclass(frozen=True)
class Baselines:
    """Autoregressive decoding of one turn with the run's verifier (AR-same) and with the reference (AR-ref)."""

    ar_same: Timing
    ar_ref: Timing


@dataclass(frozen=True)
class Exactness:
    """An output compared with autoregressive decoding.

    match_self: whether it equals the output of autoregressive decoding with the same verifier
    first_divergence, top2_gap: see `quasar.evaluation.exactness.Comparison`
    match_reference: whether it equals the output of the reference; None if the reference was not decoded
    """

    match_self: bool
    first_divergence: int | None
    top2_gap: float | None
    match_reference: bool | None = None


@dataclass(frozen=True)
class Turn:
    """One answer. baselines and exactness are None, and an empty object in the file, if they were not measured."""

    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    steps: Steps
    milliseconds: Milliseconds
    baselines: Baselines | None = None
    exactness: Exactness | None = None

    def to_json(self) -> Json:
        baselines = {} if self.baselines is None else {key: vars(value) for key, value in vars(self.baselines).items()}
        return {
            **vars(self),
            "steps": self.steps.to_json(),
            "milliseconds": vars(self.milliseconds),
            "baselines": baselines,
            "exactness": {} if self.exactness is None else vars(self.exactness),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Turn:
        values = _values(cls, content)
        baselines, exactness = values["baselines"], values["exactness"]
        values["steps"] = Steps.from_json(values["steps"])
        values["milliseconds"] = built(Milliseconds, values["milliseconds"])
        values["baselines"] = None
        if baselines:
            timings = {key: built(Timing, timing) for key, timing in _values(Baselines, baselines).items()}
            values["baselines"] = Baselines(**timings)
        values["exactness"] = built(Exactness, exactness) if exactness else None
        return cls(**values)


@dataclass(frozen=True)
class ForcedAnswer:
    """The verifier compared with the reference on the reference's answer to one turn.

    token_ids: the reference's answer
    emitted: tokens emitted per step of forced decoding; their mean is τ_ref
    kl, top1: KL(reference || verifier) in nats and argmax agreement, per token of the answer; empty in all repetitions
        but the first, because they do not depend on time
    noise_kl, noise_top1: the same two values for the reference against its own weights in float32
    forced_ms: decode time of forced decoding, without prefill
    ar_same_ms, ar_ref_ms: decode time of autoregressive decoding along the same answer, by the verifier and by the
        reference; None if the run measured no baselines
    """

    token_ids: list[int]
    emitted: list[int]
    kl: list[float]
    top1: list[bool]
    noise_kl: list[float]
    noise_top1: list[bool]
    forced_ms: float
    ar_same_ms: float | None
    ar_ref_ms: float | None


@dataclass(frozen=True)
class PromptRecord:
    """A line of generations.jsonl.

    correct: whether the answer solves its task; None if it was not graded
    fidelity: one entry per turn; empty if fidelity was not measured
    repetition: number of the repetition, from 0
    attempt: number of the attempt that decoded the prompt; above 1 if the run was interrupted and continued before
    """

    question_id: str
    family: str
    turns: list[Turn]
    correct: bool | None = None
    fidelity: list[ForcedAnswer] = field(default_factory=list)
    repetition: int = 0
    attempt: int = 1

    def to_json(self) -> Json:
        turns, fidelity = [turn.to_json() for turn in self.turns], [vars(answer) for answer in self.fidelity]
        return _line({**vars(self), "turns": turns, "fidelity": fidelity})

    @classmethod
    def from_json(cls, content: object) -> PromptRecord:
        """Return the record in a line.

        Raises ValueError if its schema version differs, a key is missing, or its checksum shows that it was changed
        after it was written.
        """
        line = _of_this_version(content)
        try:
            values = _values(cls, line)
            values["turns"] = [Turn.from_json(turn) for turn in values["turns"]]
            values["fidelity"] = [built(ForcedAnswer, answer) for answer in values["fidelity"]]
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        _require_unchanged(line)
        return cls(**values)


def checksum(content: Mapping[str, Any]) -> str:
    """Return a checksum over an object's keys and values, apart from the checksum that it contains."""
    kept = {key: value for key, value in content.items() if key != CHECKSUM_KEY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


PassPoint = tuple[int, int, int]
"""What is timed: context, repetition and rows."""


@dataclass(frozen=True)
class PassRecord:
    """A line of passes.jsonl: the time of one verification pass, and of the reference's pass with one row beside it.

    rows: the pass's rows, the last token and the draft tokens
    context: number of cached tokens that both passes read
    repetition: number of the repetition, from 0
    pass_ms, reference_ms: durations in milliseconds
    copy_bandwidth: bytes read and written per second by a copy that was timed in the same repetition
    attempt: number of the attempt that timed the passes, as in `PromptRecord`
    """

    rows: int
    context: int
    repetition: int
    pass_ms: float
    reference_ms: float
    copy_bandwidth: float
    attempt: int = 1

    def to_json(self) -> Json:
        return _line(vars(self))

    @classmethod
    def from_json(cls, content: object) -> PassRecord:
        """Return the record in a line. Raises ValueError like `PromptRecord.from_json`."""
        line = _of_this_version(content)
        record = built(cls, line)
        _require_unchanged(line)
        return record

    @property
    def point(self) -> PassPoint:
        return self.context, self.repetition, self.rows


def built(cls: type[Record], content: Mapping[str, Any]) -> Record:
    """Return an object of a dataclass. Raises ValueError if ``content`` is not an object or lacks a field."""
    return cls(**_values(cls, content))


def _line(content: Json) -> Json:
    """Return the content of a JSON line: an object's keys, the version of the schema and a checksum over both."""
    versioned = {VERSION_KEY: SCHEMA_VERSION, **content}
    return {**versioned, CHECKSUM_KEY: checksum(versioned)}


def _of_this_version(content: object) -> Mapping[str, Any]:
    """Return the JSON object of a line. Raises ValueError if it is none, or if its schema version differs."""
    if not isinstance(content, Mapping):
        raise ValueError("it is not a JSON object")
    if content.get(VERSION_KEY) != SCHEMA_VERSION:
        found = f"{VERSION_KEY} {content[VERSION_KEY]!r}" if VERSION_KEY in content else f"no {VERSION_KEY}"
        raise ValueError(f"it has {found}, this code reads version {SCHEMA_VERSION}")
    return content


def _require_unchanged(line: Mapping[str, Any]) -> None:
    if line.get(CHECKSUM_KEY) != checksum(line):
        raise ValueError("its checksum does not fit: it was changed after it was written")


def _values(cls: type[Any], content: Mapping[str, Any]) -> Json:
    """Return the values of the class's fields. Raises ValueError if ``content`` is not an object or lacks a field."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{cls.__name__} is not a JSON object")
    names = [entry.name for entry in fields(cls)]
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{cls.__name__} lacks {', '.join(map(repr, missing))}")
    return {name: content[name] for name in names}
