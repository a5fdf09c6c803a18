"""The tables that a sweep prints before and after its jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from quasar.experiment.sweep.plan import Job, summary_line
from quasar.results.console import Reporter
from quasar.results.overview import unfinished_rows
from quasar.results.runs import StoredRun

OVERRIDES_WIDTH = 110


def print_plan(jobs: Sequence[Job], root: Path, reporter: Reporter) -> None:
    """Print every job with its planned action, its finished prompts, and the overrides that not all jobs share."""
    common = set.intersection(*(set(job.request.overrides) for job in jobs)) if len(jobs) > 1 else set()
    rows = []
    for job in jobs:
        finished = job.stored.prompts if job.stored is not None and not job.replaces else 0
        own = " ".join(override for override in job.request.overrides if override not in common)
        rows.append([job.folder, job.action, str(finished), own[:OVERRIDES_WIDTH]])
    columns = ["job", "action", "prompts done", "overrides"]
    reporter.console.print(reporter.build_table(str(root), columns, rows, text=(0, 1, 3)))
    reporter.line(summary_line(jobs))


def print_interrupted(runs: Sequence[StoredRun], root: Path, reporter: Reporter) -> None:
    """Print what an interrupted sweep has done, what is left, and how to continue it."""
    counts = Counter(run.status for run in runs)
    begun = counts["failed"] + counts["partial"]
    parts = [f"{counts['done']} of {len(runs)} jobs done"]
    parts += [
        f"{count} {words}" for count, words in ((begun, "to continue"), (counts["pending"], "not begun")) if count
    ]
    if counts["running"]:
        parts.append(f"{counts['running']} still running")
    reporter.line()
    reporter.line(f"sweep {root} was interrupted: {', '.join(parts)}")
    reporter.line("pass resume=true to the same command to continue it")


def print_outcome(runs: Sequence[StoredRun], root: Path, reporter: Reporter) -> None:
    """Print how many jobs are done, the unfinished ones if there are any, and the commands to use next."""
    unfinished = [run for run in runs if run.status in ("failed", "partial")]
    done = sum(run.status == "done" for run in runs)
    reporter.line()
    reporter.line(f"sweep {root}: {done} of {len(runs)} jobs done")
    if unfinished:
        columns, rows = unfinished_rows(unfinished, root)
        title = f"{len(unfinished)} jobs failed (tracebacks in their status.json)"
        reporter.console.print(reporter.build_table(title, columns, rows, text=(0, 1, 3)))
        reporter.line("pass resume=true to the same command to run them again")
    reporter.line(f"quasar collect {root}")
