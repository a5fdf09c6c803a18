"""The timed passes of an experiment as one tidy table: one row per arm, context, number of rows and repetition.

Passes of an emulated number format are left out, because their times say nothing about the format.

| columns | meaning |
| --- | --- |
| arm, verifier | the configuration |
| rows, context, repetition | rows of the pass, tokens of context that it reads, and the repetition from 0 |
| pass_ms | time of the pass |
| reference_ms | time of the reference's pass with one row behind the same context, right before or after it |
| copy_bandwidth | bytes per second of a copy in the same repetition |
| attempt | number of the run's attempt that timed the pass |
| weight_bytes, kv_bytes | bytes of weights, and of the context's keys and values, that the pass reads |
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from quasar.config.schema import PassesConfig
from quasar.errors import RequestError
from quasar.results.generations import read_passes
from quasar.results.labels import arm_names
from quasar.results.runs import StoredRun
from quasar.results.schema import Json

KEY = ("arm", "context", "rows", "repetition")
"""The columns that identify a row."""


def pass_rows_of_runs(runs: Sequence[StoredRun]) -> pd.DataFrame | None:
    """Return the timed passes of finished runs; None if no run timed any that is not emulated.

    Raises RequestError if two runs of the same arm timed passes.
    """
    rows = [row for run, arm in zip(runs, arm_names(runs), strict=True) for row in _rows_of_run(run, arm)]
    if not rows:
        return None
    table = pd.DataFrame(rows)
    twice = table[table.duplicated(list(KEY))]
    if len(twice):
        raise RequestError(
            f"arm {twice.iloc[0]['arm']!r} has timed its passes in more than one job; give each job of an experiment "
            "that times passes its own name in hydra.sweeper.arms, and sweep nothing else"
        )
    return table.sort_values(list(KEY), key=_in_order_of_appearance, kind="stable", ignore_index=True)


def pass_shortcomings(passes: pd.DataFrame | None, declared: PassesConfig) -> list[str]:
    """Return why timed passes may not be committed; an empty list if they may, or if none are declared."""
    if not declared.repetitions:
        return []
    if passes is None:
        return ["timed passes are declared, but there are none"]
    counts = passes.groupby(["arm", "context", "rows"])["repetition"].nunique()
    found = []
    if counts.min() < declared.repetitions:
        found.append(f"{declared.repetitions} repetitions of every pass are declared, but there are {counts.min()}")
    for name, column, values in (("rows", "rows", declared.rows), ("contexts", "context", declared.contexts)):
        missing = sorted(set(values) - set(passes[column]))
        if missing:
            found.append(f"no pass was timed for the declared {name} {', '.join(map(str, missing))}")
    return found


def _rows_of_run(run: StoredRun, name: str) -> list[Json]:
    if run.summary.get("emulated"):
        return []
    facts = {"weight_bytes": run.summary.get("weight_bytes")}
    arm = {"arm": name, "verifier": run.config["verifier"]["name"]}
    per_token = run.summary.get("kv_bytes_per_token", 0)
    return [
        {**arm, **vars(record), **facts, "kv_bytes": per_token * record.context} for record in read_passes(run.folder)
    ]


def _in_order_of_appearance(column: pd.Series) -> pd.Series:
    """Sort key that leaves arms in their order and sorts numbers by size."""
    return pd.Series(pd.factorize(column)[0], index=column.index) if column.name == "arm" else column
