"""The one table of metrics, and how each is computed from the records of a run.

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
from quasar.results.schema import DECODE_PHASES, PHASES, Exactness, ForcedAnswer, Json, PromptRecord, Turn

BOOTSTRAP_RESAMPLES = 2000
MISSING = "-"
"""How tables show what was not measured."""


Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class RunFacts:
    """What metrics need to know of a run beside its records.

    model, drafter, verifier, data: their names in the configuration
    model_origin, weights_on_grid: see `quasar.results.schema.ModelFiles`
    verifier_label: the verifier's model in words; is_reference: whether it is the reference itself
    weight_bytes: read by every verification pass; kv_bytes_per_token: read for every token of context
    copy_bandwidth: bytes per second, see `quasar.results.environment.copy_bandwidth`
    simulated: whether acceptance was replayed, so that the text means nothing
    lossy: whether the acceptance rule follows no model's distribution, whatever the verifier
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


class Measured:
    """The records that metrics are computed from, with the sums over them; `add` takes in one more.

    records: of finished prompts
    steps, drafted, accepted, emitted, context: sums over all steps of all turns
    """

    def __init__(self, records: Iterable[PromptRecord] = (), facts: RunFacts | None = None) -> None:
        self.records: list[PromptRecord] = []
        self.steps = self.drafted = self.accepted = self.emitted = self.context = 0
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
        """What is known of the run. Raises ValueError where only records were given."""
        if self._facts is None:
            raise ValueError("this metric is one of a whole run; it cannot be computed from records alone")
        return self._facts

    @property
    def turns(self) -> list[Turn]:
        return [turn for record in self.records for turn in record.turns]

    @property
    def answers(self) -> list[ForcedAnswer]:
        """The reference's answers, along which fidelity was measured."""
        return [answer for record in self.records for answer in record.fidelity]

    def milliseconds(self, *phases: str) -> float:
        return sum(sum(self._phases[phase]) for phase in phases)

    def of_family(self, family: str) -> Measured:
        """The same run's prompts of one task family."""
        return Measured([record for record in self.records if record.family == family], self._facts)


def tokens_generated(run: Measured) -> int:
    return sum(len(turn.token_ids) for turn in run.turns)


def tokens_per_second(run: Measured) -> float | None:
    """Total tokens over total time, prefill apart; the first token of a turn belongs to its prefill."""
    return _ratio(run.emitted * 1e3, run.milliseconds(*DECODE_PHASES))


def prefill_tokens_per_second(run: Measured) -> float | None:
    return _ratio(sum(turn.prompt_tokens for turn in run.turns) * 1e3, run.milliseconds("prefill"))


def mean_acceptance_length(run: Measured) -> float | None:
    """τ: tokens emitted per step, the bonus token included."""
    return _ratio(run.emitted, run.steps)


def mean_acceptance_length_ref(run: Measured) -> float | None:
    """τ_ref: tokens emitted per step while the sequence is forced along the reference's answers."""
    return _mean([count for answer in run.answers for count in answer.emitted])


def kl_to_reference(run: Measured) -> float | None:
    """Mean over all tokens of the reference's answers, as the three that follow."""
    return _mean([value for answer in run.answers for value in answer.kl])


def top1_agreement(run: Measured) -> float | None:
    return _mean([float(value) for answer in run.answers for value in answer.top1])


def kl_noise_floor(run: Measured) -> float | None:
    """The reference against itself, in one pass and step by step."""
    return _mean([value for answer in run.answers for value in answer.noise_kl])


def top1_noise_floor(run: Measured) -> float | None:
    return _mean([float(value) for answer in run.answers for value in answer.noise_top1])


def exact_match_length(run: Measured) -> float | None:
    """Tokens of an answer before the first at which the verifier's argmax differs, mean over answers."""
    return _mean([[*answer.top1, False].index(False) for answer in run.answers])


def distinct_4gram_ratio(run: Measured) -> float | None:
    """Mean over the free-running outputs; a simulation has no text."""
    return None if run.facts.simulated else _repetition(turn.token_ids for turn in run.turns)


def distinct_4gram_ratio_reference(run: Measured) -> float | None:
    """Mean over the reference's own answers."""
    return _repetition(answer.token_ids for answer in run.answers)


def task_accuracy(run: Measured) -> float | None:
    """Share of the graded answers that are right."""
    return _mean([record.correct for record in run.records if record.correct is not None])


def acceptance_rate(run: Measured) -> float | None:
    """Accepted draft tokens over proposed ones."""
    return _ratio(run.accepted, run.drafted)


def acceptance_by_position(run: Measured) -> list[float]:
    """Share of the drafts that reached each depth whose accepted path did, from depth 1 on."""
    depth, accepted = _column(run, "depth"), _column(run, "accepted")
    deepest = int(depth.max(initial=0))
    return [float((accepted >= position).sum() / (depth >= position).sum()) for position in range(1, deepest + 1)]


def drafter_notes(run: Measured) -> Json | None:
    """The drafter's notes over all steps: means of numbers; counts and τ per value of text. None where it has none.

    For example ``{"chosen_length": 3.2, "member": {"ngram": {"steps": 80, "drafted": 310, …}}}``.
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
    """Per step: proposing, and the drafter's learning from the step."""
    return _ratio(run.milliseconds("draft") + run.milliseconds("observe"), run.steps)


def verify_ms(run: Measured) -> float | None:
    return _ratio(run.milliseconds("verify"), run.steps)


def overhead_ms(run: Measured) -> float | None:
    """Per step: accepting and bookkeeping."""
    return _ratio(run.milliseconds("overhead"), run.steps)


def step_ms(run: Measured) -> float | None:
    return _ratio(run.milliseconds(*DECODE_PHASES), run.steps)


def speedup_vs_ar_same(run: Measured) -> float | None:
    """Throughput over that of autoregressive decoding by the same verifier, on the same prompts."""
    return _speedup_over(run, "ar_same")


def speedup_vs_ar_ref(run: Measured) -> float | None:
    """Throughput over that of autoregressive decoding by the reference, on the same prompts."""
    return _speedup_over(run, "ar_ref")


def speedup_ci95(run: Measured) -> list[float] | None:
    """95 % interval of the speedup over AR-ref: a percentile bootstrap over prompts. None for fewer than two."""
    from scipy import stats

    pairs = _paired(run.records, "ar_ref")
    if not pairs or len(pairs[0]) < 2:
        return None
    interval = stats.bootstrap(
        pairs, _speedup, paired=True, vectorized=True, n_resamples=BOOTSTRAP_RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def reference_text_speedup(run: Measured) -> float | None:
    """The reference's autoregressive decode time over the pair's, both along the reference's own answers.

    Both decode the same tokens, so that no difference between the texts of two models enters.
    """
    pairs = _reference_text_times(run)
    return float(_time_ratio(pairs[0], pairs[1])) if pairs else None


def reference_text_speedup_ci95(run: Measured) -> list[float] | None:
    """95 % interval of that speedup: a BCa bootstrap (Efron 1987) over prompts. None for fewer than two."""
    from scipy import stats

    pairs = _reference_text_times(run)
    if not pairs or len(pairs[0]) < 2:
        return None
    if np.ptp(pairs[1] / pairs[0]) == 0:
        return None  # BCa has no interval if all prompts have the same ratio.
    interval = stats.bootstrap(
        pairs, _time_ratio, paired=True, vectorized=True, n_resamples=BOOTSTRAP_RESAMPLES, method="BCa", rng=0
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def exact_match_to_self(run: Measured) -> float | None:
    """Share of the greedy outputs that equal autoregressive decoding by the same verifier."""
    return _share(run, lambda found: found.match_self)


def exact_match_to_reference(run: Measured) -> float | None:
    """Share of the greedy outputs that equal autoregressive decoding by the reference."""
    return _share(run, lambda found: found.match_reference)


def mean_context(run: Measured) -> float | None:
    """Cached tokens that a verification pass read."""
    return _ratio(float(run.context), run.steps)


def bytes_per_step(run: Measured) -> float:
    """Weights, and keys and values of the mean context, that a verification pass has to read."""
    return run.facts.weight_bytes + run.facts.kv_bytes_per_token * (mean_context(run) or 0)


def achieved_bandwidth_fraction(run: Measured) -> float | None:
    """Bytes per step over the pass's time, as a share of the measured copy bandwidth."""
    milliseconds = verify_ms(run)
    return bytes_per_step(run) / (milliseconds / 1e3) / run.facts.copy_bandwidth if milliseconds else None


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    name: its key in summary.json and its column in a table of runs
    compute: from the records; None where the run did not measure it
    heading: of its column in printed tables; form: how a value is written there
    better: which direction is better, where one is
    printed: whether it is a column of the run's own table
    in_summary: whether it enters summary.json; the others serve the run's closing lines
    curve: its name among the live curves in Weights & Biases
    config_key: where the configuration of a run that has not ended says the same
    parts: names of a list's entries, each of which is a column of its own in a table of runs
    """

    name: str
    compute: Callable[[Measured], Any]
    unit: str = ""
    heading: str = ""
    form: Callable[[Any], str] = str
    better: Better | None = None
    printed: bool = False
    in_summary: bool = True
    curve: str | None = None
    config_key: str | None = None
    parts: tuple[str, ...] = ()

    def text(self, value: Any) -> str:
        """A value as printed tables show it."""
        return MISSING if value is None else self.form(value)

    def columns(self, value: Any) -> Json:
        """The columns of a table of runs, with their values."""
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
    Metric("prompts", lambda run: len(run.records), "prompts", "prompts", printed=True),
    Metric("tokens_generated", tokens_generated, "tokens", "tokens", printed=True),
    Metric(
        "tokens_per_second", tokens_per_second, "tokens/s", "tokens/s", _1, UP, printed=True, curve="tokens_per_second"
    ),
    Metric("prefill_tokens_per_second", prefill_tokens_per_second, "tokens/s", "prefill tokens/s", _0, UP),
    Metric(
        "mean_acceptance_length",
        mean_acceptance_length,
        "tokens/step",
        "τ",
        _2,
        UP,
        printed=True,
        curve="acceptance_length",
    ),
    Metric("mean_acceptance_length_ref", mean_acceptance_length_ref, "tokens/step", "τ_ref", _2, UP, printed=True),
    Metric("kl_to_reference", kl_to_reference, "nats/token", "KL", _4, DOWN, printed=True),
    Metric("top1_agreement", top1_agreement, "share", "top-1", _3, UP, printed=True),
    Metric("kl_noise_floor", kl_noise_floor, "nats/token", "KL noise", _4),
    Metric("top1_noise_floor", top1_noise_floor, "share", "top-1 noise", _3),
    Metric("exact_match_length", exact_match_length, "tokens", "match length", _1, UP),
    Metric("distinct_4gram_ratio", distinct_4gram_ratio, "share", "distinct 4-grams", _2),
    Metric("distinct_4gram_ratio_reference", distinct_4gram_ratio_reference, "share", "reference's 4-grams", _2),
    Metric("task_accuracy", task_accuracy, "share", "accuracy", _2, UP),
    Metric("acceptance_rate", acceptance_rate, "share", "accept", _3, UP, printed=True, curve="acceptance_rate"),
    Metric("acceptance_by_position", acceptance_by_position, "share", "acceptance by position", _positions),
    Metric("drafter_notes", drafter_notes),
    Metric("draft_ms", draft_ms, "ms", "draft ms", _2, DOWN),
    Metric("verify_ms", verify_ms, "ms", "verify ms", _2, DOWN),
    Metric("overhead_ms", overhead_ms, "ms", "overhead ms", _2, DOWN),
    Metric("step_ms", step_ms, "ms", "step ms", _2, DOWN, printed=True),
    Metric("speedup_vs_ar_same", speedup_vs_ar_same, "ratio", "vs AR-same", _times, UP, printed=True),
    Metric("speedup_vs_ar_ref", speedup_vs_ar_ref, "ratio", "vs AR-ref", _times, UP, printed=True),
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
    Metric("exact_match_to_self", exact_match_to_self, "share", "= AR-same", _percent, UP, printed=True),
    Metric("exact_match_to_reference", exact_match_to_reference, "share", "= AR-ref", _percent, UP),
    Metric("weight_bytes", lambda run: run.facts.weight_bytes, "bytes", "weights MB", _megabytes, DOWN),
    Metric("bytes_per_step", bytes_per_step, "bytes", "MB per step", _megabytes, DOWN),
    Metric("achieved_bandwidth_fraction", achieved_bandwidth_fraction, "share", "of copy bandwidth", _percent, UP),
    Metric("peak_memory_bytes", lambda run: run.facts.peak_memory_bytes, "bytes", "peak memory MB", _megabytes, DOWN),
    Metric("device", lambda run: run.facts.device),
    Metric("model_origin", lambda run: run.facts.model_origin),
    Metric("weights_on_grid", lambda run: run.facts.weights_on_grid, "share", "weights on a grid", _percent),
    Metric("simulated", lambda run: run.facts.simulated),
    Metric("lossy", lambda run: run.facts.lossy),
    Metric("mean_context", mean_context, "tokens", "context", _0, in_summary=False),
    Metric("steps", lambda run: run.steps, "steps", "steps", in_summary=False),
    Metric("drafted", lambda run: run.drafted, "tokens", "drafted", in_summary=False),
    Metric("accepted", lambda run: run.accepted, "tokens", "accepted", in_summary=False),
)


def compute(run: Measured) -> Json:
    """Every metric of the table, by name."""
    return {metric.name: metric.compute(run) for metric in METRICS}


def summary_of(values: Json) -> Json:
    """The content of summary.json: flat, null where the run did not measure a metric."""
    return {metric.name: values[metric.name] for metric in METRICS if metric.in_summary}


def named(name: str) -> Metric:
    """The metric of that name. Raises KeyError where the table has none."""
    return {metric.name: metric for metric in METRICS}[name]


def _decode_ms(record: PromptRecord) -> float:
    """Time in which a prompt was decoded, prefill apart."""
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


def _paired(records: Sequence[PromptRecord], baseline: str) -> list[np.ndarray]:
    """Columns over the prompts that decoded tokens both ways: tokens and milliseconds, with drafting and in the
    baseline. Empty where there are none.
    """
    rows = []
    for record in records:
        baselines = [turn.baselines for turn in record.turns if turn.baselines is not None]
        if len(baselines) < len(record.turns):
            continue
        timings = [getattr(entry, baseline) for entry in baselines]
        tokens = sum(sum(turn.steps.emitted) for turn in record.turns)
        base_tokens = sum(timing.decoded_tokens for timing in timings)
        if tokens and base_tokens:
            base_ms = sum(timing.decode_ms for timing in timings)
            rows.append((tokens, _decode_ms(record), base_tokens, base_ms))
    return [np.array(column) for column in zip(*rows, strict=True)]


def _speedup_over(run: Measured, baseline: str) -> float | None:
    pairs = _paired(run.records, baseline)
    return float(_speedup(pairs[0], pairs[1], pairs[2], pairs[3])) if pairs else None


def _speedup(
    tokens: np.ndarray, ms: np.ndarray, base_tokens: np.ndarray, base_ms: np.ndarray, axis: int = -1
) -> np.ndarray:
    return (tokens.sum(axis) / ms.sum(axis)) / (base_tokens.sum(axis) / base_ms.sum(axis))


def _reference_text_times(run: Measured) -> list[np.ndarray]:
    """Columns over the prompts: milliseconds along the reference's answers, by the pair and by AR-ref. Empty if the
    run did not measure them.
    """
    rows = []
    for record in run.records:
        baselines = [answer.ar_ref_ms for answer in record.fidelity if answer.ar_ref_ms is not None]
        forced = sum(answer.forced_ms for answer in record.fidelity)
        if forced and baselines and len(baselines) == len(record.fidelity):
            rows.append((forced, sum(baselines)))
    return [np.array(column) for column in zip(*rows, strict=True)]


def _time_ratio(ms: np.ndarray, base_ms: np.ndarray, axis: int = -1) -> np.ndarray:
    ratio: np.ndarray = base_ms.sum(axis) / ms.sum(axis)
    return ratio


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
