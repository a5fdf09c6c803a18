"""The table of all metrics, and the functions that compute them from the records of a run.

The run's printed table, summary.json, the columns of ``quasar collect``, the curves in Weights & Biases and the tables
of experiments/ are all derived from `METRICS`. To add a metric, write a function of `Measured`, give it a row in the
table, and test the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from quasar.evaluation.repetition import distinct_ngram_ratio
from quasar.results.intervals import Statistic, Sums, estimate, ratio_of_totals, value_of
from quasar.results.load import DISTURBED
from quasar.results.pass_curve import pass_curve
from quasar.results.schema import (
    DECODE_PHASES,
    PHASES,
    Exactness,
    ForcedAnswer,
    Json,
    PassRecord,
    PromptRecord,
    Turn,
)

MISSING = "-"
"""Tables show this in place of a value that was not measured."""


Better = Literal["higher", "lower"]


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
                sums.append(_phase_ms(turn, phase))

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


def prompts(run: Measured) -> int:
    """Number of prompts that were decoded."""
    return len({record.question_id for record in run.records})


def repetitions(run: Measured) -> int:
    """Number of times that each prompt was decoded."""
    return len({record.repetition for record in run.records})


def tokens_generated(run: Measured) -> int:
    """Number of tokens in all answers."""
    return sum(len(turn.token_ids) for turn in run.turns)


def tokens_per_second(run: Measured) -> float | None:
    """Total tokens divided by total decode time. The prefill and its token, the first of each turn, are excluded."""
    return _ratio(run.emitted * 1e3, run.milliseconds(*DECODE_PHASES))


def prefill_tokens_per_second(run: Measured) -> float | None:
    """Prompt tokens divided by the time of the prefill."""
    return _ratio(sum(turn.prompt_tokens for turn in run.turns) * 1e3, run.milliseconds("prefill"))


def mean_acceptance_length(run: Measured) -> float | None:
    """τ: tokens emitted per step, the bonus token included."""
    return _ratio(run.emitted, run.steps)


def mean_acceptance_length_ref(run: Measured) -> float | None:
    """τ_ref: tokens emitted per step while decoding is forced along the reference's answers."""
    return _mean([count for answer in run.answers for count in answer.emitted])


def kl_to_reference(run: Measured) -> float | None:
    """Mean KL divergence in nats over all tokens of the reference's answers."""
    return _mean([value for answer in run.answers for value in answer.kl])


def top1_agreement(run: Measured) -> float | None:
    """Share of the tokens of the reference's answers at which the verifier and the reference have the same argmax."""
    return _mean([float(value) for answer in run.answers for value in answer.top1])


def kl_noise_floor(run: Measured) -> float | None:
    """Mean KL divergence between the reference and its own weights in float32: the effect of rounding activations."""
    return _mean([value for answer in run.answers for value in answer.noise_kl])


def top1_noise_floor(run: Measured) -> float | None:
    """Argmax agreement between the reference and its own weights in float32."""
    return _mean([float(value) for answer in run.answers for value in answer.noise_top1])


def exact_match_length(run: Measured) -> float | None:
    """Mean number of tokens of an answer before the first token at which the verifier's argmax differs."""
    return _mean([[*answer.top1, False].index(False) for answer in run.answers if answer.top1])


def distinct_4gram_ratio(run: Measured) -> float | None:
    """Share of distinct 4-grams, mean over the free-running outputs; None for a simulated run."""
    return None if run.facts.simulated else _repetition(turn.token_ids for turn in run.turns)


def distinct_4gram_ratio_reference(run: Measured) -> float | None:
    """Share of distinct 4-grams, mean over the reference's answers."""
    return _repetition(answer.token_ids for answer in run.answers)


def task_accuracy(run: Measured) -> float | None:
    """Share of the graded answers that are correct."""
    return _mean([record.correct for record in run.records if record.correct is not None])


def acceptance_rate(run: Measured) -> float | None:
    """Accepted draft tokens divided by proposed draft tokens."""
    return _ratio(run.accepted, run.drafted)


def acceptance_by_position(run: Measured) -> list[float]:
    """Acceptance per depth, from depth 1 on: of the drafts at least that deep, the share accepted to that depth."""
    depth, accepted = _column(run, "depth"), _column(run, "accepted")
    deepest = int(depth.max(initial=0))
    return [float((accepted >= position).sum() / (depth >= position).sum()) for position in range(1, deepest + 1)]


def drafter_notes(run: Measured) -> Json | None:
    """Summarize the drafter's notes over all steps; None if it made no notes.

    A column of numbers becomes its mean. A column of text becomes counts and τ for each of its values, for example
    ``{"chosen_length": 3.2, "member": {"ngram": {"steps": 80, "drafted": 310, …}}}``.
    """
    names = dict.fromkeys(name for turn in run.turns for name in turn.steps.notes)
    notes: Json = {}
    for name in names:
        noted = [turn.steps for turn in run.turns if name in turn.steps.notes]
        values = [value for steps in noted for value in steps.notes[name]]
        if not any(isinstance(value, str) for value in values):
            notes[name] = _mean(values)
            continue
        columns = {
            key: [count for steps in noted for count in getattr(steps, key)]
            for key in ("drafted", "accepted", "emitted")
        }
        notes[name] = {
            value: _noted_steps([index for index, other in enumerate(values) if other == value], columns)
            for value in sorted(set(values))
        }
    return notes or None


def draft_ms(run: Measured) -> float | None:
    """Milliseconds per step for proposing a draft and for the drafter's `observe`."""
    return _ratio(run.milliseconds("draft") + run.milliseconds("observe"), run.steps)


def verify_ms(run: Measured) -> float | None:
    """Milliseconds per step for the verification pass."""
    return _ratio(run.milliseconds("verify"), run.steps)


def overhead_ms(run: Measured) -> float | None:
    """Milliseconds per step for acceptance and bookkeeping."""
    return _ratio(run.milliseconds("overhead"), run.steps)


def step_ms(run: Measured) -> float | None:
    """Milliseconds per step in total."""
    return _ratio(run.milliseconds(*DECODE_PHASES), run.steps)


def ar_same_ms_per_token(run: Measured) -> float | None:
    """Milliseconds per token of autoregressive decoding with the same verifier: the time of a pass with one row."""
    return _value(_free_times(run, "ar_same"), ratio_of_totals("base_ms", "base_tokens"))


def speedup_vs_ar_same(run: Measured) -> float | None:
    """Throughput divided by the throughput of autoregressive decoding with the same verifier on the same prompts."""
    return _value(_free_times(run, "ar_same"), _free_speedup)


def speedup_vs_ar_ref(run: Measured) -> float | None:
    """Throughput divided by the throughput of autoregressive decoding with the reference on the same prompts."""
    return _value(_free_times(run, "ar_ref"), _free_speedup)


def speedup_ci95(run: Measured) -> list[float] | None:
    """95 % interval of the speedup over AR-ref (see `quasar.results.intervals`). None for fewer than two prompts."""
    return _interval(_free_times(run, "ar_ref"), _free_speedup)


def reference_text_speedup(run: Measured) -> float | None:
    """The reference's autoregressive decode time over the pair's, both along the reference's own answers.

    Both decode the same tokens, so that no difference between the texts of two models enters.
    """
    return _value(_reference_text_times(run), _TEXT_SPEEDUP)


def reference_text_speedup_ci95(run: Measured) -> list[float] | None:
    """95 % interval of that speedup (see `quasar.results.intervals`). None for fewer than two prompts."""
    return _interval(_reference_text_times(run), _TEXT_SPEEDUP)


def pass_cost(run: Measured) -> float | None:
    """c: mean time of the steps' verification passes over that of a pass with one row, from passes timed by themselves.

    Of a step with γ draft tokens this is t(γ + 1) / t(1), behind the measured context that is nearest to the mean
    context. A drafter's scratch rows are not counted.
    """
    passes, one = _pass_ms(run, "drafted"), _pass_ms(run, None)
    return None if passes is None or one is None else passes / one


def predicted_speedup(run: Measured) -> float | None:
    """τ / c: the speedup over AR-same if a step were nothing but its verification pass."""
    cost, length = pass_cost(run), mean_acceptance_length(run)
    return None if cost is None or length is None else length / cost


def prediction_residual(run: Measured) -> float | None:
    """Measured over predicted speedup; below 1 by drafting and by whatever else a step does beside its pass."""
    measured, predicted = speedup_vs_ar_same(run), predicted_speedup(run)
    return None if measured is None or predicted is None else measured / predicted


def share_of_oracle(run: Measured) -> float | None:
    """Predicted speedup over that of an oracle, which ends every draft behind its last token that will be accepted.

    It emits the same tokens in the same steps, so that the share is the time of its passes over that of the run's:
    sum of t(accepted + 1) / sum of t(drafted + 1). 1 means that no pass was longer than it had to be.
    """
    oracle, passes = _pass_ms(run, "accepted"), _pass_ms(run, "drafted")
    return None if passes is None or oracle is None else oracle / passes


def exact_match_to_self(run: Measured) -> float | None:
    """Share of the outputs that equal autoregressive decoding with the same verifier; of greedy or coupled decoding."""
    return _share(run, lambda found: found.match_self)


def exact_match_to_reference(run: Measured) -> float | None:
    """Share of the greedy outputs that equal autoregressive decoding with the reference."""
    return _share(run, lambda found: found.match_reference)


def mean_context(run: Measured) -> float | None:
    """Mean number of cached tokens that a verification pass reads."""
    return _ratio(float(run.context), run.steps)


def bytes_per_step(run: Measured) -> float:
    """Bytes that a verification pass has to read: the weights, and the keys and values of the mean context."""
    return run.facts.weight_bytes + run.facts.kv_bytes_per_token * (mean_context(run) or 0)


def achieved_bandwidth_fraction(run: Measured) -> float | None:
    """Bytes per step divided by the time of the verification pass, as a share of the measured copy bandwidth."""
    milliseconds = None if run.emulated else verify_ms(run)
    return bytes_per_step(run) / (milliseconds / 1e3) / run.facts.copy_bandwidth if milliseconds else None


def disturbed(run: Measured) -> bool | None:
    """Whether other processes took so much of the run's cores that its times are not comparable."""
    share = run.facts.other_cpu_share
    return None if share is None else share > DISTURBED


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    name: its key in summary.json and its column in a table of runs
    compute: computes it from the records; returns None if the run did not measure it
    heading: heading of its column in printed tables
    form: formats a value for printed tables
    better: whether higher or lower values are better; None if neither is
    rank: its rank among the columns of printed tables, see `ranked`; None if it is not one of them
    in_summary: whether it is in summary.json; the others appear only in the notes below a run's table
    curve: name of its live curve in Weights & Biases
    config_key: configuration key with the same value, for runs that have not ended
    parts: names of the entries if the value is a list; each entry is a separate column in a table of runs
    """

    name: str
    compute: Callable[[Measured], Any]
    unit: str = ""
    heading: str = ""
    form: Callable[[Any], str] = str
    better: Better | None = None
    rank: int | None = None
    in_summary: bool = True
    curve: str | None = None
    config_key: str | None = None
    parts: tuple[str, ...] = ()

    def text(self, value: Any) -> str:
        """Return a value as printed tables show it."""
        return MISSING if value is None else self.form(value)

    def columns(self, value: Any) -> Json:
        """Return the metric's columns in a table of runs, with their values."""
        if not self.parts:
            return {self.name: value}
        values = [None] * len(self.parts) if value is None else value
        return {f"{self.name}_{part}": entry for part, entry in zip(self.parts, values, strict=True)}


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}"


def _positions(shares: Sequence[float]) -> str:
    return ",".join(f"{share:.2f}".removeprefix("0") for share in shares)


def _bounds(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2f}x to {interval[1]:.2f}x"


_0, _1, _2, _3, _4 = (f"{{:.{digits}f}}".format for digits in range(5))
_times, _percent = "{:.2f}x".format, "{:.0%}".format
UP: Better = "higher"
DOWN: Better = "lower"

METRICS: tuple[Metric, ...] = (
    Metric("model", lambda run: run.facts.model, heading="model", config_key="model.name"),
    Metric("drafter", lambda run: run.facts.drafter, heading="drafter", config_key="drafter.name"),
    Metric("verifier", lambda run: run.facts.verifier, heading="verifier", config_key="verifier.name"),
    Metric("data", lambda run: run.facts.data, heading="data", config_key="data.name"),
    Metric("temperature", lambda run: run.facts.temperature, heading="temperature", config_key="decode.temperature"),
    Metric("prompts", prompts, "prompts", "prompts", rank=12),
    Metric("repetitions", repetitions, "repetitions", "repetitions"),
    Metric("tokens_generated", tokens_generated, "tokens", "tokens", rank=11),
    Metric("tokens_per_second", tokens_per_second, "tokens/s", "tokens/s", _1, UP, rank=5, curve="tokens_per_second"),
    Metric("prefill_tokens_per_second", prefill_tokens_per_second, "tokens/s", "prefill tokens/s", _0, UP),
    Metric(
        "mean_acceptance_length",
        mean_acceptance_length,
        "tokens/step",
        "τ",
        _2,
        UP,
        rank=4,
        curve="acceptance_length",
    ),
    Metric("mean_acceptance_length_ref", mean_acceptance_length_ref, "tokens/step", "τ_ref", _2, UP, rank=3),
    Metric("kl_to_reference", kl_to_reference, "nats/token", "KL", _4, DOWN, rank=2),
    Metric("top1_agreement", top1_agreement, "share", "top-1", _3, UP, rank=10),
    Metric("kl_noise_floor", kl_noise_floor, "nats/token", "KL noise", _4),
    Metric("top1_noise_floor", top1_noise_floor, "share", "top-1 noise", _3),
    Metric("exact_match_length", exact_match_length, "tokens", "match length", _1, UP),
    Metric("distinct_4gram_ratio", distinct_4gram_ratio, "share", "distinct 4-grams", _2),
    Metric("distinct_4gram_ratio_reference", distinct_4gram_ratio_reference, "share", "reference's 4-grams", _2),
    Metric("task_accuracy", task_accuracy, "share", "accuracy", _2, UP),
    Metric("acceptance_rate", acceptance_rate, "share", "accept", _3, UP, rank=7, curve="acceptance_rate"),
    Metric("acceptance_by_position", acceptance_by_position, "share", "acceptance by position", _positions),
    Metric("drafter_notes", drafter_notes),
    Metric("draft_ms", draft_ms, "ms", "draft ms", _2, DOWN),
    Metric("verify_ms", verify_ms, "ms", "verify ms", _2, DOWN),
    Metric("overhead_ms", overhead_ms, "ms", "overhead ms", _2, DOWN),
    Metric("step_ms", step_ms, "ms", "step ms", _2, DOWN, rank=8),
    Metric("speedup_vs_ar_same", speedup_vs_ar_same, "ratio", "vs AR-same", _times, UP, rank=6),
    Metric("speedup_vs_ar_ref", speedup_vs_ar_ref, "ratio", "vs AR-ref", _times, UP, rank=1),
    Metric("speedup_ci95", speedup_ci95, "ratio", "95 % interval", _bounds, parts=("low", "high")),
    Metric("reference_text_speedup", reference_text_speedup, "ratio", "on reference's text", _times, UP),
    Metric(
        "reference_text_speedup_ci95",
        reference_text_speedup_ci95,
        "ratio",
        "its 95 % interval",
        _bounds,
        parts=("low", "high"),
    ),
    Metric("pass_cost", pass_cost, "ratio", "pass cost", _2, DOWN),
    Metric("predicted_speedup", predicted_speedup, "ratio", "predicted vs AR-same", _times, UP),
    Metric("prediction_residual", prediction_residual, "ratio", "measured / predicted", _2, UP),
    Metric("share_of_oracle", share_of_oracle, "share", "of oracle", _percent, UP),
    Metric("exact_match_to_self", exact_match_to_self, "share", "= AR-same", _percent, UP, rank=9),
    Metric("exact_match_to_reference", exact_match_to_reference, "share", "= AR-ref", _percent, UP),
    Metric("weight_bytes", lambda run: run.facts.weight_bytes, "bytes", "weights MB", _megabytes, DOWN),
    Metric("kv_bytes_per_token", lambda run: run.facts.kv_bytes_per_token, "bytes", "KV bytes per token"),
    Metric("bytes_per_step", bytes_per_step, "bytes", "MB per step", _megabytes, DOWN),
    Metric("achieved_bandwidth_fraction", achieved_bandwidth_fraction, "share", "of copy bandwidth", _percent, UP),
    Metric("peak_memory_bytes", lambda run: run.facts.peak_memory_bytes, "bytes", "peak memory MB", _megabytes, DOWN),
    Metric("device", lambda run: run.facts.device),
    Metric("model_origin", lambda run: run.facts.model_origin),
    Metric("weights_on_grid", lambda run: run.facts.weights_on_grid, "share", "weights on a grid", _percent),
    Metric("simulated", lambda run: run.facts.simulated),
    Metric("emulated", lambda run: run.facts.emulated),
    Metric("lossy", lambda run: run.facts.lossy),
    Metric("disturbed", disturbed),
    Metric("mean_context", mean_context, "tokens", "context", _0, in_summary=False),
    Metric("steps", lambda run: run.steps, "steps", "steps", in_summary=False),
    Metric("drafted", lambda run: run.drafted, "tokens", "drafted", in_summary=False),
    Metric("accepted", lambda run: run.accepted, "tokens", "accepted", in_summary=False),
)


def compute(run: Measured) -> Json:
    """Compute every metric of the table, by name."""
    return {metric.name: metric.compute(run) for metric in METRICS}


def summary_of(values: Json) -> Json:
    """Return the content of summary.json: a flat object, null for each metric that the run did not measure."""
    return {metric.name: values[metric.name] for metric in METRICS if metric.in_summary}


def named(name: str) -> Metric:
    """Return the metric with this name. Raises KeyError if there is none."""
    return {metric.name: metric for metric in METRICS}[name]


def ranked() -> list[Metric]:
    """Return the columns of printed tables, the most important first. A table that is too narrow drops the last ones.

    KL and τ_ref come before τ, because τ alone favours a verifier that repeats itself.
    """
    return sorted((metric for metric in METRICS if metric.rank is not None), key=lambda metric: metric.rank or 0)


def _decode_ms(record: PromptRecord) -> float:
    """Return the decode time of a prompt in milliseconds, without the prefill."""
    return sum(_phase_ms(turn, phase) for turn in record.turns for phase in DECODE_PHASES)


def _phase_ms(turn: Turn, phase: str) -> float:
    return float(np.sum(getattr(turn.milliseconds, phase)))


def _column(run: Measured, name: str) -> np.ndarray:
    return np.asarray([count for turn in run.turns for count in getattr(turn.steps, name)], dtype=np.int64)


def _noted_steps(steps: Sequence[int], columns: dict[str, list[int]]) -> Json:
    sums = {key: sum(counts[step] for step in steps) for key, counts in columns.items()}
    return {
        "steps": len(steps),
        **sums,
        "acceptance_rate": _ratio(sums["accepted"], sums["drafted"]),
        "mean_acceptance_length": _ratio(sums["emitted"], len(steps)),
    }


@dataclass(frozen=True)
class _Crossed:
    """Columns [Q, R] over prompts and repetitions, and the task family of each prompt."""

    columns: dict[str, np.ndarray]
    families: list[str]


def _crossed(run: Measured, values: Callable[[PromptRecord], dict[str, float] | None]) -> _Crossed | None:
    """Collect ``values`` of every record. A prompt that lacks them in any repetition is left out.

    Returns None if no prompt is left, or if the verifier's arithmetic is emulated: its times are then no speedup.
    """
    if run.emulated:
        return None
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for record in run.records:
        if (entry := values(record)) is not None:
            found.setdefault((record.family, record.question_id), []).append(entry)
    complete = {key: entries for key, entries in sorted(found.items()) if len(entries) == repetitions(run)}
    if not complete:
        return None
    names = next(iter(complete.values()))[0]
    columns = {name: np.array([[entry[name] for entry in row] for row in complete.values()]) for name in names}
    return _Crossed(columns, [family for family, _ in complete])


def _free_times(run: Measured, baseline: str) -> _Crossed | None:
    """Tokens and decode time of the run and of a baseline. Prompts are left out if either decoded no token."""

    def values(record: PromptRecord) -> dict[str, float] | None:
        baselines = [turn.baselines for turn in record.turns if turn.baselines is not None]
        timings = [getattr(entry, baseline) for entry in baselines]
        tokens = sum(sum(turn.steps.emitted) for turn in record.turns)
        base_tokens = sum(timing.decoded_tokens for timing in timings)
        if len(baselines) < len(record.turns) or not tokens or not base_tokens:
            return None
        base_ms = sum(timing.decode_ms for timing in timings)
        return {"tokens": tokens, "ms": _decode_ms(record), "base_tokens": base_tokens, "base_ms": base_ms}

    return _crossed(run, values)


def _reference_text_times(run: Measured) -> _Crossed | None:
    """Decode time along the reference's answers, by the pair and by AR-ref."""

    def values(record: PromptRecord) -> dict[str, float] | None:
        baselines = [answer.ar_ref_ms for answer in record.fidelity if answer.ar_ref_ms is not None]
        forced = sum(answer.forced_ms for answer in record.fidelity)
        if not forced or not baselines or len(baselines) < len(record.fidelity):
            return None
        return {"ms": forced, "base_ms": sum(baselines)}

    return _crossed(run, values)


def _free_speedup(sums: Sums) -> np.ndarray:
    ours, theirs = (sums[f"{arm}tokens"].sum(-1) / sums[f"{arm}ms"].sum(-1) for arm in ("", "base_"))
    ratio: np.ndarray = ours / theirs
    return ratio


_TEXT_SPEEDUP = ratio_of_totals("base_ms", "ms")


def _value(found: _Crossed | None, statistic: Statistic) -> float | None:
    return None if found is None else value_of(found.columns, found.families, statistic)


def _interval(found: _Crossed | None, statistic: Statistic) -> list[float] | None:
    if found is None:
        return None
    estimated = estimate(found.columns, found.families, statistic)
    return None if estimated.low is None or estimated.high is None else [estimated.low, estimated.high]


def _pass_ms(run: Measured, column: str | None) -> float | None:
    """Return the mean over the steps of t(count + 1), with the counts of a column of `Steps`; 0 without a column.

    None if there is no step, if no pass was timed, if a count is beyond the timed passes, or if they were emulated.
    """
    curve = None if run.emulated else pass_curve(run.passes, mean_context(run) or 1.0)
    if curve is None or not run.steps:
        return None
    times = curve.at(1 + (np.zeros(1) if column is None else _column(run, column)))
    return None if times is None else float(times.mean())


def _share(run: Measured, matches: Callable[[Exactness], bool | None]) -> float | None:
    found = [matches(turn.exactness) for turn in run.turns if turn.exactness is not None]
    return _mean([match for match in found if match is not None])


def _repetition(outputs: Iterable[Sequence[int]]) -> float | None:
    ratios = [distinct_ngram_ratio(tokens) for tokens in outputs]
    return _mean([ratio for ratio in ratios if ratio is not None])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
