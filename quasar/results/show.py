"""The command ``quasar show``: prints a finished or unfinished run from its files, without loading a model."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from quasar.config.checks import shown
from quasar.errors import RequestError
from quasar.results.console import Reporter
from quasar.results.files import read_json
from quasar.results.generations import read_passes, read_records
from quasar.results.load import worst_of
from quasar.results.measured import Measured, RunFacts
from quasar.results.metrics import compute
from quasar.results.report import acceptance_line, print_results
from quasar.results.runs import StoredRun, flatten, read_run
from quasar.results.schema import Json
from quasar.results.store import ENVIRONMENT


def show(folder: Path, reporter: Reporter) -> None:
    """Print the header, the state, the results so far and the settings of the run in a folder.

    Raises RequestError if the folder contains no run, or one of an earlier version of the code.
    """
    run = stored_run(folder)
    environment = environment_of(run)
    reporter.header({**environment["header"], "output": str(folder), "state": _state(run)})
    for text in environment["warnings"]:
        reporter.warning(text)
    records = read_records(folder)
    if records:
        measured = Measured(records, facts_of(run, environment), read_passes(folder))
        values = compute(measured)
        print_results(reporter, measured, values)
        reporter.line(acceptance_line(values))
    reporter.line()
    reporter.header({key: shown(value) for key, value in flatten(run.config).items() if not key.endswith("_target_")})


def stored_run(folder: Path) -> StoredRun:
    """Read the run in a folder. Raises RequestError if the folder is missing or contains no run that has begun."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; pass the folder of a run, hydra.run.dir")
    run = read_run(folder)
    if not run.config:
        raise RequestError(
            f"{folder}: contains no run (config.yaml is missing or damaged); pass the folder of one run, and for "
            "several use quasar collect"
        )
    return run


def environment_of(run: StoredRun) -> Json:
    """Return the content of a run's environment.json. Raises RequestError if it lacks what a run stores today."""
    content = read_json(run.folder / ENVIRONMENT)
    missing = [key for key in ("header", "warnings", "facts", "inputs") if key not in (content or {})]
    if content is None or missing:
        reason = "missing or damaged" if content is None else f"lacks {', '.join(missing)}"
        raise RequestError(
            f"{run.folder / ENVIRONMENT}: {reason}; an earlier version of the code wrote it, so run again in another "
            "folder"
        )
    return content


def facts_of(run: StoredRun, environment: Json) -> RunFacts:
    """Return the facts that metrics need. Those that are known only at the end come from summary.json if it exists.

    Raises RequestError if another version of the code wrote them.
    """
    stored = environment["facts"]
    names = {field.name for field in fields(RunFacts)}
    if not isinstance(stored, dict) or set(stored) != names:
        raise RequestError(f"{run.folder / ENVIRONMENT}: facts of another version of the code; use that version")
    facts = RunFacts(**stored)
    peak = run.summary.get("peak_memory_bytes", facts.peak_memory_bytes)
    return replace(facts, peak_memory_bytes=peak, other_cpu_share=worst_of(environment.get("attempts", [])))


def _state(run: StoredRun) -> str:
    total = "?" if run.total is None else run.total
    reason = "" if run.error is None else f": {run.error.strip().splitlines()[-1]}"
    return f"{run.status}, {run.prompts} of {total} prompts{reason}"
