"""Times of a run and of a baseline on the same prompts, and the speedups that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quasar.results.intervals import Statistic, Sums, estimate, ratio_of_totals, value_of
from quasar.results.measured import Measured, phase_ms
from quasar.results.schema import DECODE_PHASES, PromptRecord


@dataclass(frozen=True)
class PairedTimes:
    """Columns [Q, R] over prompts and repetitions, and the task family of each prompt."""

    columns: dict[str, np.ndarray]
    families: list[str]


def free_times(run: Measured, baseline: str) -> PairedTimes | None:
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


def reference_text_times(run: Measured) -> PairedTimes | None:
    """Decode time along the reference's answers, by the pair and by AR-ref."""

    def values(record: PromptRecord) -> dict[str, float] | None:
        baselines = [answer.ar_ref_ms for answer in record.fidelity if answer.ar_ref_ms is not None]
        forced = sum(answer.forced_ms for answer in record.fidelity)
        if not forced or not baselines or len(baselines) < len(record.fidelity):
            return None
        return {"ms": forced, "base_ms": sum(baselines)}

    return _crossed(run, values)


def ratio(found: PairedTimes | None, statistic: Statistic) -> float | None:
    """Return a statistic of the columns; None without times."""
    return None if found is None else value_of(found.columns, found.families, statistic)


def ratio_interval(found: PairedTimes | None, statistic: Statistic) -> list[float] | None:
    """Return the 95 % interval of a statistic (see `quasar.results.intervals`); None for fewer than two prompts."""
    if found is None:
        return None
    estimated = estimate(found.columns, found.families, statistic)
    return None if estimated.low is None or estimated.high is None else [estimated.low, estimated.high]


def free_speedup(sums: Sums) -> np.ndarray:
    """The statistic of `free_times` that compares the throughput of both."""
    ours, theirs = (sums[f"{arm}tokens"].sum(-1) / sums[f"{arm}ms"].sum(-1) for arm in ("", "base_"))
    ratio: np.ndarray = ours / theirs
    return ratio


text_speedup = ratio_of_totals("base_ms", "ms")
"""The statistic of `reference_text_times`."""
baseline_ms_per_token = ratio_of_totals("base_ms", "base_tokens")
"""The statistic of `free_times` for the baseline alone: its milliseconds per token."""


def _crossed(run: Measured, values: Callable[[PromptRecord], dict[str, float] | None]) -> PairedTimes | None:
    """Collect ``values`` of every record. A prompt that lacks them in any repetition is left out.

    Returns None if no prompt is left, or if the verifier's arithmetic is emulated: its times then say nothing.
    """
    if run.emulated:
        return None
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for record in run.records:
        if (entry := values(record)) is not None:
            found.setdefault((record.family, record.question_id), []).append(entry)
    complete = {key: entries for key, entries in sorted(found.items()) if len(entries) == run.repetitions}
    if not complete:
        return None
    names = next(iter(complete.values()))[0]
    columns = {name: np.array([[entry[name] for entry in row] for row in complete.values()]) for name in names}
    return PairedTimes(columns, [family for family, _ in complete])


def _decode_ms(record: PromptRecord) -> float:
    """Return the decode time of a prompt in milliseconds, without the prefill."""
    return sum(phase_ms(turn, phase) for turn in record.turns for phase in DECODE_PHASES)
