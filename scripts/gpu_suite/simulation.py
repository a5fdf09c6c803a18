"""SIMULATES tokens per second from measured times of whole passes and the acceptance of a recorded run."""

from __future__ import annotations

import numpy as np

from quasar.results.trace import TracedTurn, read_trace
from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json


def measure(plan: Plan, passes: list[Json]) -> Json:
    """Return for each weight format the speed with the trace's drafts and without drafts; nothing without a trace.

    Counts passes only: drafting and bookkeeping take no time here.
    """
    if plan.trace is None:
        return {"skipped": "no --trace FILE"}
    turns = read_trace(plan.trace)
    passes = [row for row in passes if "milliseconds" in row]
    rows = []
    for weights in dict.fromkeys(row["weights"] for row in passes):
        own = [row for row in passes if row["weights"] == weights]
        drafted = sum(_milliseconds(own, turn, with_drafts=True) for turn in turns)
        plain = sum(_milliseconds(own, turn, with_drafts=False) for turn in turns)
        tokens = sum(len(turn.accepted) + sum(turn.accepted) for turn in turns)
        rows.append(
            {
                "simulated": True,
                "weights": weights,
                "acceptance_length": tokens / sum(len(turn.accepted) for turn in turns),
                "tokens_per_second": tokens / drafted * 1e3,
                "tokens_per_second_without_drafts": tokens / plain * 1e3,
            }
        )
    return {"simulated": True, "trace": plan.trace.name, "rows": rows}


def _milliseconds(passes: list[Json], turn: TracedTurn, with_drafts: bool) -> float:
    """Sum the times of a turn's steps. A pass of an unmeasured size takes the time of the next larger measured one."""
    sizes = sorted({row["rows"] for row in passes})
    total, context = 0.0, turn.prompt_tokens
    for drafted, accepted in zip(turn.drafted, turn.accepted, strict=True):
        size = next((rows for rows in sizes if rows >= 1 + drafted), sizes[-1]) if with_drafts else sizes[0]
        points = sorted((row["context"], row["milliseconds"]) for row in passes if row["rows"] == size)
        one = float(np.interp(context, *zip(*points, strict=True)))
        total += one * (1 if with_drafts else 1 + accepted)
        context += 1 + accepted
    return total
