"""Runs an experiment of conf/experiment and writes its results: ``make reproduce EXPERIMENT=main_table``."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

from quasar.config.rules import check
from quasar.config.schema import CONF, register
from quasar.errors import QuasarError, RequestError
from quasar.results.agreement import agreements
from quasar.results.collect import all_runs
from quasar.results.console import Reporter
from quasar.results.excerpts import refreshed
from quasar.results.files import write_atomically
from quasar.results.pass_rows import pass_rows_of_runs
from quasar.results.provenance import provenance_of
from quasar.results.publish import RESULTS, Experiment, publish, redraw, require_committable, shortcomings
from quasar.results.rows import read_rows, rows_of_runs
from quasar.results.simulation import SIMULATION, redraw_simulation

COMMITTED = Path("experiments")
"""The folder of committed results, one folder per experiment."""
SWEEPS = Path("outputs") / "experiments"
"""The folder of the experiments' sweeps, and of results that may not be committed."""


def experiment_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """Read an experiment. Raises RequestError for an unknown name."""
    if name not in experiment_names():
        raise RequestError(f"experiment={name}: not in conf/experiment; choose one of {', '.join(experiment_names())}")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = check(compose("config", overrides=[f"experiment={name}"]))
    return Experiment(name, config.publish, config.evaluate.repetitions, config.evaluate.passes)


def reproduce(name: str, overrides: Sequence[str], prompts: Path | None, reporter: Reporter) -> Path:
    """Run the experiment's sweep, or what an interrupted attempt left of it, and publish its results.

    overrides: further overrides of the sweep, such as ``data.limit=5`` or ``hydra/launcher=slurm``
    prompts: Spec-Bench JSONL, a file or a folder; None: the built-in prompts

    Results that may not be committed, because they have fewer prompts than declared for example, are written beside the
    sweep and compared with the committed ones. Returns the folder that was written.

    Raises QuasarError if a job fails; the same command continues the sweep.
    """
    experiment = load_experiment(name)
    data = ["data=builtin"] if prompts is None else ["data=specbench", f"data.path='{prompts.resolve()}'"]
    sweep = SWEEPS / name / _definition(name, [*data, *overrides])
    code = _run_sweep([f"experiment={name}", *data, *overrides, f"hydra.sweep.dir={sweep}", "resume=true"])
    if code:
        raise QuasarError(f"{sweep}: not every job is done; the same command continues where it stopped")
    runs = all_runs(sweep)
    provenance = provenance_of(runs).declared(name, experiment.publish.prompts)
    rows = rows_of_runs(runs)
    passes = pass_rows_of_runs(runs)
    reasons = shortcomings(rows, passes, provenance, experiment)
    folder = sweep / "published" if reasons else COMMITTED / name
    for file in publish(folder, rows, provenance, experiment.publish, complete=not reasons, passes=passes):
        reporter.line(f"wrote {file}")
    if reasons:
        reporter.warning(f"not written to {COMMITTED / name}: {'; '.join(reasons)}")
        _compare(experiment, folder, reporter)
    return folder


def redraw_all(reporter: Reporter) -> None:
    """Draw the tables and figures of all committed results again, and copy tables into the README files.

    Raises RequestError if results may not be committed, or their experiment is no longer in conf/experiment.
    """
    for folder in committed_folders():
        experiment = load_experiment(folder.name)
        require_committable(folder, experiment)
        for file in redraw(folder, experiment.publish):
            reporter.line(f"wrote {file}")
    for folder in simulated_folders():
        reporter.line(f"wrote {redraw_simulation(folder)}")
    for file in readmes():
        write_atomically(file, refreshed(file.read_text(encoding="utf-8"), Path()))


def readmes() -> list[Path]:
    """Return the README files that may contain tables of committed results."""
    return [file for file in (Path("README.md"), *sorted(COMMITTED.glob("**/README.md"))) if file.is_file()]


def committed_folders() -> list[Path]:
    return sorted(file.parent for file in COMMITTED.glob(f"*/{RESULTS}"))


def simulated_folders() -> list[Path]:
    """Return the folders of committed results of `quasar simulate`."""
    return sorted(file.parent for file in COMMITTED.glob(f"*/{SIMULATION}"))


def _run_sweep(arguments: list[str]) -> int:
    from quasar.experiment.main import main

    before = sys.argv
    sys.argv = ["run.py", "-m", *arguments]
    try:
        return main()
    finally:
        sys.argv = before


def _definition(name: str, overrides: Sequence[str]) -> str:
    """Return a folder name made from the experiment's file and the overrides; other sweeps have other names."""
    content = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([content, *overrides]).encode()).hexdigest()[:8]


def _compare(experiment: Experiment, folder: Path, reporter: Reporter) -> None:
    """Print whether the intervals of this repetition overlap those of the committed results, if there are any."""
    committed = COMMITTED / experiment.name / RESULTS
    if not committed.is_file():
        return
    names = list(dict.fromkeys(name for names in experiment.publish.tables.values() for name in names))
    found = agreements(read_rows(committed), read_rows(folder / RESULTS), names)
    columns = ["arm", "quantity", "committed", "repeated", "intervals"]
    rows = [entry.cells() for entry in found]
    reporter.table(f"{experiment.name}: committed and repeated", columns, rows, text=range(len(columns)))
    differing = sum(entry.overlaps is False for entry in found)
    reporter.line(f"{len(found) - differing} of {len(found)} intervals overlap the committed ones")
