"""One tidy table of all runs below a folder: one row per run in any state, one column per key that varies."""

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

from quasar.config.hash import NOT_HASHED
from quasar.errors import RequestError
from quasar.results import metrics
from quasar.results.runs import StoredRun, flatten, read_run, run_folders
from quasar.results.schema import Json

READERS = 8
IDENTITY = {metric.name: metric.config_key for metric in metrics.METRICS if metric.config_key is not None}
"""The columns that every run has, finished or not, with the configuration keys that they are read from."""
JOINED = " + "

_NULLABLE = {bool: "boolean", int: "Int64", float: "Float64", str: "string"}


class Collector:
    """Reads the runs below a folder. It can be asked repeatedly and reads each finished run only once.

    Raises RequestError if the folder does not exist.
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


def all_runs(root: Path) -> list[StoredRun]:
    """Return all runs below ``root``. Raises RequestError if the folder does not exist or contains none."""
    runs = Collector(root).runs()
    if not runs:
        raise RequestError(f"{root}: contains no runs; pass a folder that runs were written to, such as multirun")
    return runs


@dataclass(frozen=True)
class Written:
    """The files that a table was written to."""

    parquet: Path
    csv: Path


def tabulate(runs: Sequence[StoredRun], root: Path) -> pd.DataFrame:
    """Return a table with one row per run: folder, state, machine, varying configuration keys and summary keys.

    Keys of the configuration contain dots (``decode.max_new_tokens``), keys of summary.json do not. A key that is
    missing from a run's configuration, such as an option of another drafter, is null. Only finished runs have a
    summary.
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
    """Return the keys of flat configurations that have more than one value, in order of appearance.

    A key that is missing from a configuration counts as null there.
    """
    values: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for config in configs:
        for key, value in config.items():
            if value is not None and _describes(key):
                values.setdefault(key, set()).add(json.dumps(value, default=str))
                counts[key] += 1
    return [key for key, found in values.items() if len(found) > 1 or counts[key] < len(configs)]


def write(table: pd.DataFrame, stem: Path) -> Written:
    """Write ``stem``.parquet and ``stem``.csv."""
    written = Written(stem.with_suffix(".parquet"), stem.with_suffix(".csv"))
    table.to_parquet(_partial(written.parquet), index=False)
    _partial(written.csv).write_text(csv_text(table), encoding="utf-8")
    for file in (written.parquet, written.csv):
        _partial(file).replace(file)
    return written


def csv_text(table: pd.DataFrame) -> str:
    """Return the table as CSV, with lists as JSON text."""
    text = table.copy()
    for column in text.select_dtypes("object").columns:
        text[column] = [json.dumps(value) if isinstance(value, list) else None for value in text[column]]
    return text.to_csv(index=False)


def _metrics(summary: Json) -> Json:
    """Return the columns of a run's summary. Keys that are not in the table of metrics come last and stay unchanged."""
    table = {metric.name: metric for metric in metrics.METRICS}
    columns: Json = {}
    for name in [*table, *(key for key in summary if key not in table)]:
        if name in summary and name not in IDENTITY:
            columns.update(table[name].columns(summary[name]) if name in table else {name: summary[name]})
    return columns


def _describes(key: str) -> bool:
    """Whether a configuration key affects the results and is not already shown in another column."""
    top = key.split(".", 1)[0]
    return top not in NOT_HASHED and not key.endswith("_target_") and key not in IDENTITY.values()


def _series(values: list[Any]) -> pd.Series:
    """Return a column of one nullable type. Lists stay lists; values of several types become JSON text."""
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
