"""The table of all metrics, and the functions that compute them from the records of a run.

The run's printed table, summary.json, the columns of ``quasar collect``, the curves in Weights & Biases and the tables
of experiments/ are all derived from `METRICS`. To add a metric, write a function of `Measured`, give it a row in the
table, and test the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from quasar.evaluation.repetition import distinct_ngram_ratio
from quasar.results.load import DISTURBED
from quasar.results.measured import Measured
from quasar.results.metric import Better, Metric
from quasar.results.paired_times import (
    baseline_ms_per_token,
    free_speedup,
    free_times,
    ratio,
    ratio_interval,
    reference_text_times,
    text_speedup,
)
from quasar.results.pass_curve import pass_curve
from quasar.results.schema import DECODE_PHASES, Exactness, Json


def prompts(run: Measured) -> int:
    """Number of prompts that were decoded."""
    return len({record.question_id for record in run.records})


def repetitions(run: Measured) -> int:
    """Number of times that each prompt was decoded."""
    return run.repetitions


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
    return ratio(free_times(run, "ar_same"), baseline_ms_per_token)


def speedup_vs_ar_same(run: Measured) -> float | None:
    """Throughput divided by the throughput of autoregressive decoding with the same verifier on the same prompts."""
    return ratio(free_times(run, "ar_same"), free_speedup)


def speedup_vs_ar_ref(run: Measured) -> float | None:
    """Throughput divided by the throughput of autoregressive decoding with the reference on the same prompts."""
    return ratio(free_times(run, "ar_ref"), free_speedup)


def speedup_ci95(run: Measured) -> list[float] | None:
    """95 % interval of the speedup over AR-ref (see `quasar.results.intervals`). None for fewer than two prompts."""
    return ratio_interval(free_times(run, "ar_ref"), free_speedup)


def reference_text_speedup(run: Measured) -> float | None:
    """The reference's autoregressive decode time over the pair's, both along the reference's own answers.

    Both decode the same tokens, so that no difference between the texts of two models enters.
    """
    return ratio(reference_text_times(run), text_speedup)


def reference_text_speedup_ci95(run: Measured) -> list[float] | None:
    """95 % interval of that speedup (see `quasar.results.intervals`). None for fewer than two prompts."""
    return ratio_interval(reference_text_times(run), text_speedup)


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
    """Measured over predicted speedup; below 1 because a step does more than its pass, such as drafting."""
    measured, predicted = speedup_vs_ar_same(run), predicted_speedup(run)
    return None if measured is None or predicted is None else measured / predicted


def share_of_oracle(run: Measured) -> float | None:
    """Predicted speedup over that of an oracle, which ends every draft after the last token that will be accepted.

    It emits the same tokens in the same steps, so that the share is the time of its passes over that of the run's:
    sum of t(accepted + 1) / sum of t(drafted + 1). 1 means that no pass was longer than it had to be.
    """
    oracle, passes = _pass_ms(run, "accepted"), _pass_ms(run, "drafted")
    return None if passes is None or oracle is None else oracle / passes


def memory_bound_speedup(run: Measured) -> float | None:
    """The speedup over AR-same if a pass took the time of reading its weights (MBSU; Goel et al. 2024).

    It is τ / (1 + c γ) with γ draft tokens per step and c the weights that drafting a token reads over those of a
    verification pass. Without a draft model it equals τ.
    """
    tau, draft_bytes = mean_acceptance_length(run), run.facts.draft_weight_bytes
    if tau is None or draft_bytes is None:
        return None
    return tau / (1 + draft_bytes / run.facts.weight_bytes * run.drafted / run.steps)


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
    Metric("memory_bound_speedup", memory_bound_speedup, "ratio", "MBSU", _times, UP),
    Metric("pass_cost", pass_cost, "ratio", "pass cost", _2, DOWN),
    Metric("predicted_speedup", predicted_speedup, "ratio", "predicted vs AR-same", _times, UP),
    Metric("prediction_residual", prediction_residual, "ratio", "measured / predicted", _2, UP),
    Metric("share_of_oracle", share_of_oracle, "share", "of oracle", _percent, UP),
    Metric("exact_match_to_self", exact_match_to_self, "share", "= AR-same", _percent, UP, rank=9),
    Metric("exact_match_to_reference", exact_match_to_reference, "share", "= AR-ref", _percent, UP),
    Metric("weight_bytes", lambda run: run.facts.weight_bytes, "bytes", "weights MB", _megabytes, DOWN),
    Metric("kv_bytes_per_token", lambda run: run.facts.kv_bytes_per_token, "bytes", "KV bytes per token"),
    Metric("draft_weight_bytes", lambda run: run.facts.draft_weight_bytes, "bytes", "draft weights MB", _megabytes),
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
