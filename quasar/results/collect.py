"""All runs below a folder as one tidy table: a row per run, whatever its state, a column per key that varies."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from quasar.config.schema import NOT_HASHED
from quasar.errors import RequestError
from quasar.results import metrics
from quasar.results.runs import StoredRun, flatten, read_run, run_folders
from quasar.results.schema import Json

READERS = 8
IDENTITY = {metric.name: metric.config_key for metric in metrics.METRICS if metric.config_key is not None}
"""Columns that every run has, finished or not, and the configuration's keys behind them."""
JOINED = " + "

_NULLABLE = {bool: "boolean", int: "Int64", float: "Float64", str: "string"}


class Collector:
    """Reads the runs below a folder; again and again without reading finished ones twice.

    Raises RequestError where the folder does not exist.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise RequestError(f"{root}: no such folder; pass one that runs were written to, such as multirun")
        self.root = root
        self._finished: dict[Path, tuple[int, StoredRun]] = {}

    def runs(self) -> list[StoredRun]:
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(lambda found: self._read(*found), run_folders(self.root)))

    def _read(self, folder: Path, overrides: tuple[str, ...]) -> StoredRun:
        changed = _changed(folder)
        known = self._finished.get(folder)
        if known is not None and known[0] == changed:
            return known[1]
        run = read_run(folder, overrides)
        if run.status == "done":
            self._finished[folder] = (changed, run)
        return run


@dataclass(frozen=True)
class Written:
    """Where a table was written."""

    parquet: Path
    csv: Path


def tabulate(runs: Sequence[StoredRun], root: Path) -> pd.DataFrame:
    """A row per run: its folder, state and machine, the configuration's keys that vary, the keys of its summary.

    Keys of the configuration keep their dots (``decode.max_new_tokens``), those of summary.json have none. A key that a
    run's configuration lacks (another drafter's option) is null. Only finished runs have a summary.
    """
    flat = [flatten(run.config) for run in runs]
    varying = varying_keys([keys for keys in flat if keys])
    rows = [
        {
            "run": os.path.relpath(run.folder, root),
            "status": run.status,
            "error": run.error,
            "prompts_done": run.prompts,
            "machine": JOINED.join(run.machines) or None,
            "code_version": JOINED.join(run.code_versions) or None,
            "config_hash": run.config_hash,
            "overrides": " ".join(run.overrides) or None,
            **{column: keys.get(key) for column, key in IDENTITY.items()},
            **{key: keys.get(key) for key in varying},
            **_metrics(run.summary),
        }
        for run, keys in zip(runs, flat, strict=True)
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return pd.DataFrame({column: _series([row.get(column) for row in rows]) for column in columns})


def varying_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of flat configurations that have more than one value, null where absent, in order of appearance."""
    values: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for config in configs:
        for key, value in config.items():
            if value is not None and _describes(key):
                values.setdefault(key, set()).add(json.dumps(value, default=str))
                counts[key] += 1
    return [key for key, found in values.items() if len(found) > 1 or counts[key] < len(configs)]


def write(table: pd.DataFrame, stem: Path) -> Written:
    """``stem``.parquet and ``stem``.csv; lists are JSON in the latter."""
    written = Written(stem.with_suffix(".parquet"), stem.with_suffix(".csv"))
    table.to_parquet(_partial(written.parquet), index=False)
    text = table.copy()
    for column in text.select_dtypes("object").columns:
        text[column] = [None if value is None else json.dumps(value) for value in text[column]]
    text.to_csv(_partial(written.csv), index=False)
    for file in (written.parquet, written.csv):
        _partial(file).replace(file)
    return written


def _metrics(summary: Json) -> Json:
    """The columns of the metrics that a run's summary has. Keys that the table does not know come last, as they are."""
    table = {metric.name: metric for metric in metrics.METRICS}
    columns: Json = {}
    for name in [*table, *(key for key in summary if key not in table)]:
        if name in summary and name not in IDENTITY:
            columns.update(table[name].columns(summary[name]) if name in table else {name: summary[name]})
    return columns


def _describes(key: str) -> bool:
    """Whether a configuration's key says what was computed, in words that no other column has."""
    top = key.split(".", 1)[0]
    return top not in NOT_HASHED and not key.endswith("_target_") and key not in IDENTITY.values()


def _series(values: list[Any]) -> pd.Series:
    """A column of one nullable type; lists stay lists, and what has several types becomes JSON text."""
    types = {type(value) for value in values if value is not None}
    if types == {int, float}:
        types = {float}
    if len(types) <= 1:
        kind = next(iter(types), str)
        if kind in _NULLABLE:
            return pd.Series(values, dtype=_NULLABLE[kind])
        if kind is list:
            return pd.Series(values, dtype=object)
    return pd.Series([value if value is None else json.dumps(value, default=str) for value in values], dtype="string")


def _changed(folder: Path) -> int:
    try:
        return (folder / "status.json").stat().st_mtime_ns
    except OSError:
        return 0


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")
