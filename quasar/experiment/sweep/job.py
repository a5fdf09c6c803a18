"""One job of a sweep: a run whose failure does not end the other jobs."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from quasar.config.hash import config_hash
from quasar.config.rules import check
from quasar.errors import report
from quasar.results.console import Reporter
from quasar.results.runs import is_locked, read_run
from quasar.results.store import BusyError, write_status
from quasar.results.wandb.live import logged

DONE = 0
BASELINES = "baselines"
"""Name of the folder, in a sweep's folder, for the baselines that its jobs share."""


def run_job(config: DictConfig) -> int:
    """Execute the job that Hydra has composed and return its exit code. A failure's traceback is in status.json.

    A job that another submission has finished in the meantime is not executed again.
    """

    from quasar.experiment import run

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    stored = read_run(folder)
    key = config_hash(config)
    if stored.status == "done" and stored.config_hash == key:
        return DONE
    command = ["run.py", *(override for override in hydra.overrides.task)]
    reporter = Reporter()
    reporter.line(f"\njob {folder.name}: {' '.join(_chosen(hydra.overrides.task))}")
    shared = Path(hydra.sweep.dir) / BASELINES if config.sweep.share_baselines else None
    try:
        with logged(check(config).logger, folder, reporter):
            run.run(config, folder, command, reporter, shared)
    except BusyError:
        # Another sweep has begun the job since this one was planned, and reports it.
        reporter.line(f"job {folder.name}: running elsewhere")
        return DONE
    except Exception as error:
        _write_traceback(folder, key)
        return report(error)
    return DONE


def _write_traceback(folder: Path, key: str) -> None:
    """Write the traceback to status.json, unless another process is working on the run."""
    if is_locked(folder):
        return
    try:
        write_status(folder, "failed", traceback.format_exc(), key)
    except OSError as error:
        print(f"{folder}/status.json: {error}", file=sys.stderr)


def _chosen(overrides: list[str]) -> list[str]:
    return [override for override in overrides if override != "resume=true"]
