"""The command ``quasar collect``: writes a table of runs and prints their states and metrics, once or repeatedly."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.table import Table

from quasar.results.answers import answers_of
from quasar.results.collect import Collector, all_runs, tabulate, write
from quasar.results.console import Reporter
from quasar.results.load import DISTURBED
from quasar.results.run_table import Choice, print_runs
from quasar.results.runs import STATES, StoredRun, flatten
from quasar.results.spec_bench import write_spec_bench
from quasar.results.specdec_bench import write_specdec_bench

STATUS_ROWS = 24
LISTED = 15
ERROR_WIDTH = 90
BENCHMARKS = {"spec-bench": write_spec_bench, "specdec-bench": write_specdec_bench}
"""What writes answers as the evaluation of another benchmark reads them, by format."""


def collect(root: Path, output: Path | None, choice: Choice, reporter: Reporter) -> None:
    """Write the table of all runs below ``root``, and print what ``choice`` wants to see of it.

    The default choice shows the states of the runs too. Markdown and CSV are printed alone. The formats of `BENCHMARKS`
    write the runs' answers instead.

    output: stem of the table's files, or folder of the answers; by default below ``root``

    Raises RequestError if there are no runs, or for an unknown column.
    """
    runs = all_runs(root)
    if choice.format in BENCHMARKS:
        for file in BENCHMARKS[choice.format](answers_of(runs, root), output or root / choice.format):
            reporter.line(f"wrote {file}")
        return
    written = write(tabulate(runs, root), output or root / "collected")
    if choice.is_default:
        print_states(runs, root, reporter)
    print_runs(runs, root, choice, reporter)
    if choice.format == "table":
        reporter.line(f"wrote {written.parquet}")
        reporter.line(f"wrote {written.csv}")


def follow(root: Path, seconds: float, reporter: Reporter) -> None:
    """Show the states of the runs until no run is running or pending, or until the user presses Ctrl-C."""
    collector = Collector(root)
    try:
        with Live(console=reporter.console, auto_refresh=False) as live:
            while True:
                runs = collector.runs()
                live.update(Group(*tables(runs, root, reporter)), refresh=reporter.interactive)
                if not any(run.status in ("running", "pending") for run in runs):
                    return
                time.sleep(seconds)
    except KeyboardInterrupt:
        return


def print_states(runs: Sequence[StoredRun], root: Path, reporter: Reporter) -> None:
    for table in tables(runs, root, reporter):
        reporter.console.print(table)
    for remark in remarks(runs):
        reporter.paragraph(remark)


def tables(runs: Sequence[StoredRun], root: Path, reporter: Reporter) -> list[Table]:
    """Return a table of the runs by state and, if there are any, a table of the failed and partial runs."""
    found = [reporter.build_table(str(root), *status_rows(runs))]
    columns, rows = unfinished_rows(runs, root)
    if rows:
        found.append(reporter.build_table("failed and partial", columns, rows, text=(0, 1, 3)))
    return found


def status_rows(runs: Sequence[StoredRun]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table of states by verifier and drafter, with at most `STATUS_ROWS` groups."""
    groups: dict[str, Counter[str]] = {}
    for run in runs:
        groups.setdefault(_group(run), Counter())[run.status] += 1
    # Unfinished groups come first, because the user looks for them.
    ordered = sorted(groups.items(), key=lambda item: item[1]["done"] == item[1].total())
    shown, rest = ordered[:STATUS_ROWS], ordered[STATUS_ROWS:]
    if rest:
        shown.append((f"... {len(rest)} more", sum((counts for _, counts in rest), Counter())))
    if len(groups) > 1:
        shown.append(("all", sum(groups.values(), Counter())))
    rows = [[name, *(str(counts[state] or "-") for state in STATES), str(counts.total())] for name, counts in shown]
    return ["verifier, drafter", *STATES, "runs"], rows


def unfinished_rows(runs: Sequence[StoredRun], root: Path) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table with the first `LISTED` failed and partial runs."""
    unfinished = [run for run in runs if run.status in ("failed", "partial")]
    rows = [
        [os.path.relpath(run.folder, root), run.status, _prompts(run), _last_line(run.error)]
        for run in unfinished[:LISTED]
    ]
    if len(unfinished) > LISTED:
        rows.append([f"... {len(unfinished) - LISTED} more", "", "", "see column status of the written table"])
    return ["run", "state", "prompts", "error"], rows


def remarks(runs: Sequence[StoredRun]) -> list[str]:
    """Return warnings if runs are not comparable: several machines or versions of the code, or a busy machine."""
    notes = []
    machines = sorted({machine for run in runs for machine in run.machines})
    if len(machines) > 1:
        notes.append(
            f"runs on {len(machines)} machines ({_some(machines)}): compare timings per machine (column machine)"
        )
    moved = sum(len(run.machines) > 1 for run in runs)
    if moved:
        notes.append(f"{moved} runs were continued on another machine: their timings come from several machines")
    versions = sorted({version for run in runs for version in run.code_versions})
    if len(versions) > 1:
        notes.append(f"runs used {len(versions)} versions of the code ({_some(versions)}; column code_version)")
    disturbed = sum(bool(run.summary.get("disturbed")) for run in runs)
    if disturbed:
        notes.append(
            f"{disturbed} runs were disturbed: other processes took more than {DISTURBED:.0%} of their cores, so that "
            "their times are not comparable (column disturbed)"
        )
    return notes


def _group(run: StoredRun) -> str:
    config = flatten(run.config)
    if config:
        return f"{config.get('verifier.name')}, {config.get('drafter.name')}"
    chosen = dict(override.split("=", 1) for override in run.overrides if "=" in override)
    named = [chosen[key] for key in ("verifier", "drafter") if key in chosen]
    return ", ".join(named) or "not begun"


def _prompts(run: StoredRun) -> str:
    return f"{run.prompts}/{'?' if run.total is None else run.total}"


def _last_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    line = lines[-1].strip() if lines else ""
    return line if len(line) <= ERROR_WIDTH else line[: ERROR_WIDTH - 3] + "..."


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
