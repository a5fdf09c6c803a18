"""From per-prompt records to the flat metrics of ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from quasar.decoding.stopwatch import DECODE_PHASES, PHASES
from quasar.evaluation.fidelity import distinct_ngram_ratio
from quasar.results.records import Json

BOOTSTRAP_RESAMPLES = 2000
STEP_COUNTS = ("drafted", "depth", "accepted", "emitted", "context")
"""Columns of a turn's steps that every run has; others are the drafter's notes."""
COUNTS = ("mean_context", "steps", "drafted", "accepted")
"""Keys of `summarize` that lead to others and are no metrics themselves."""


def summarize(records: Sequence[Json]) -> Json:
    """Metrics over all turns of all prompts.

    Throughput is total tokens over total time, prefill apart; the first token of a turn belongs to its prefill.
    acceptance_by_position[i] is the share of drafts at least i + 1 deep whose accepted path was that deep.
    Speedups compare the same prompts' throughputs; their confidence interval is a bootstrap over prompts.
    """
    turns = [turn for record in records for turn in record["turns"]]
    steps = {key: np.concatenate([_array(turn["steps"][key]) for turn in turns]) for key in STEP_COUNTS}
    phases = {key: sum(float(np.sum(turn["milliseconds"][key])) for turn in turns) for key in PHASES}
    count = len(steps["emitted"])
    decode_ms = sum(phases[key] for key in DECODE_PHASES)
    emitted = int(steps["emitted"].sum())
    drafted, accepted = int(steps["drafted"].sum()), int(steps["accepted"].sum())
    prompt_tokens = sum(turn["prompt_tokens"] for turn in turns)
    speedup_same, _ = speedup(records, "ar_same")
    speedup_ref, interval = speedup(records, "ar_ref")
    return {
        "prompts": len(records),
        "tokens_generated": sum(len(turn["token_ids"]) for turn in turns),
        "tokens_per_second": _ratio(emitted * 1e3, decode_ms),
        "prefill_tokens_per_second": _ratio(prompt_tokens * 1e3, phases["prefill"]),
        "mean_acceptance_length": _ratio(emitted, count),
        **fidelity(records),
        "task_accuracy": _mean([record["correct"] for record in records if record.get("correct") is not None]),
        "acceptance_rate": _ratio(accepted, drafted),
        "acceptance_by_position": by_position(steps["depth"], steps["accepted"]),
        "drafter_notes": summarize_notes(turns),
        "draft_ms": _ratio(phases["draft"] + phases["observe"], count),
        "verify_ms": _ratio(phases["verify"], count),
        "overhead_ms": _ratio(phases["overhead"], count),
        "step_ms": _ratio(decode_ms, count),
        "speedup_vs_ar_same": speedup_same,
        "speedup_vs_ar_ref": speedup_ref,
        "speedup_ci95": interval,
        "exact_match_to_self": _share(turns, "match_self"),
        "exact_match_to_reference": _share(turns, "match_reference"),
        "mean_context": _ratio(float(steps["context"].sum()), count),
        "steps": count,
        "drafted": drafted,
        "accepted": accepted,
    }


def fidelity(records: Sequence[Json]) -> Json:
    """Means over all tokens of the reference's answers, and its τ over all steps along them; None where not measured.

    exact_match_length: answer tokens before the first at which the verifier's argmax differs, mean over answers.
    The noise floor is the reference against itself, in one pass and step by step. distinct_4gram_ratio is that of the
    free-running output, beside the reference's own.
    """
    answers = [answer for record in records for answer in record["fidelity"]]
    outputs = [turn["token_ids"] for record in records for turn in record["turns"]]
    emitted = [count for answer in answers for count in answer["emitted"]]
    return {
        "mean_acceptance_length_ref": _mean(emitted),
        "kl_to_reference": _mean(_joined(answers, "kl")),
        "top1_agreement": _mean(_joined(answers, "top1")),
        "kl_noise_floor": _mean(_joined(answers, "noise_kl")),
        "top1_noise_floor": _mean(_joined(answers, "noise_top1")),
        "exact_match_length": _mean([[*answer["top1"], False].index(False) for answer in answers]),
        "distinct_4gram_ratio": _mean(_repetition(outputs)),
        "distinct_4gram_ratio_reference": _mean(_repetition([answer["token_ids"] for answer in answers])),
    }


def summarize_notes(turns: Sequence[Json]) -> Json | None:
    """The drafter's notes over all steps: means of numbers; counts and τ per value of text. None where it has none.

    For example ``{"chosen_length": 3.2, "member": {"ngram": {"steps": 80, "drafted": 310, …}}}``.
    """
    names = dict.fromkeys(key for turn in turns for key in turn["steps"] if key not in STEP_COUNTS)
    notes: Json = {}
    for name in names:
        noted = [turn["steps"] for turn in turns if name in turn["steps"]]
        values = [value for steps in noted for value in steps[name]]
        if not any(isinstance(value, str) for value in values):
            notes[name] = _mean(values)
            continue
        columns = {
            key: [count for steps in noted for count in steps[key]] for key in ("drafted", "accepted", "emitted")
        }
        notes[name] = {
            value: _noted_steps([index for index, other in enumerate(values) if other == value], columns)
            for value in sorted(set(values))
        }
    return notes or None


def _noted_steps(steps: Sequence[int], columns: dict[str, list[int]]) -> Json:
    sums = {key: sum(counts[step] for step in steps) for key, counts in columns.items()}
    return {
        "steps": len(steps),
        **sums,
        "acceptance_rate": _ratio(sums["accepted"], sums["drafted"]),
        "mean_acceptance_length": _ratio(sums["emitted"], len(steps)),
    }


def by_position(depth: np.ndarray, accepted: np.ndarray) -> list[float]:
    """Share of the drafts that reached each depth whose accepted path did, from depth 1 on."""
    deepest = int(depth.max(initial=0))
    return [float((accepted >= position).sum() / (depth >= position).sum()) for position in range(1, deepest + 1)]


def speedup(records: Sequence[Json], baseline: str) -> tuple[float | None, list[float] | None]:
    """Throughput over the baseline's on the same prompts, and its 95 % bootstrap interval over prompts."""
    pairs = [pair for record in records if (pair := _paired(record, baseline)) is not None]
    if not pairs:
        return None, None
    columns = [np.array(column) for column in zip(*pairs, strict=True)]

    def statistic(
        tokens: np.ndarray, ms: np.ndarray, base_tokens: np.ndarray, base_ms: np.ndarray, axis: int = -1
    ) -> Any:
        return (tokens.sum(axis) / ms.sum(axis)) / (base_tokens.sum(axis) / base_ms.sum(axis))

    value = float(statistic(columns[0], columns[1], columns[2], columns[3]))
    if len(pairs) < 2:
        return value, None
    interval = stats.bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=BOOTSTRAP_RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return value, [float(interval.low), float(interval.high)]


def decoded(record: Json) -> tuple[int, float]:
    """Tokens decoded for one prompt, and the milliseconds that took, prefill apart."""
    turns = record["turns"]
    ms = sum(float(np.sum(turn["milliseconds"][key])) for turn in turns for key in DECODE_PHASES)
    return sum(sum(turn["steps"]["emitted"]) for turn in turns), ms


def _paired(record: Json, baseline: str) -> tuple[float, float, float, float] | None:
    """Decoded tokens and milliseconds of a prompt, with drafting and in the baseline; None where one decoded none."""
    turns = record["turns"]
    if any(turn["baselines"].get(baseline) is None for turn in turns):
        return None
    tokens, ms = decoded(record)
    base_tokens = sum(turn["baselines"][baseline]["decoded_tokens"] for turn in turns)
    base_ms = sum(turn["baselines"][baseline]["decode_ms"] for turn in turns)
    return (tokens, ms, base_tokens, base_ms) if tokens and base_tokens else None


def _joined(answers: Sequence[Json], key: str) -> list[float]:
    return [float(value) for answer in answers for value in answer[key]]


def _repetition(outputs: Sequence[Sequence[int]]) -> list[float]:
    ratios = [distinct_ngram_ratio(tokens) for tokens in outputs]
    return [ratio for ratio in ratios if ratio is not None]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _share(turns: Sequence[Json], key: str) -> float | None:
    found = [turn["exactness"][key] for turn in turns if turn["exactness"].get(key) is not None]
    return _mean(found)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _array(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)
