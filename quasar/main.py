"""The command line of ``run.py``: composes the configuration, executes the run, and turns errors into exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from quasar.config.schema import CONF, check, register, require_path
from quasar.errors import QuasarError, RequestError, report
from quasar.experiment.sweep.ending import SweepEnded

DONE, WRONG_REQUEST, INTERRUPTED = 0, 2, 130


def main() -> int:
    """Execute the run or sweep in ``sys.argv`` and return the exit code, the largest one of all jobs."""
    register()
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> int:
        # A job of a sweep may run in another process, which gets the code as the return value.
        codes.append(_run(config))
        return codes[-1]

    try:
        job()
    except SweepEnded as ended:
        return ended.exit_code
    except SystemExit as stop:
        # If no job has started, Hydra has printed what is wrong with the request.
        return WRONG_REQUEST if stop.code and not codes else int(stop.code or DONE)
    except KeyboardInterrupt:
        return INTERRUPTED
    return max(codes, default=DONE)


def _run(config: DictConfig) -> int:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from quasar.experiment.sweep.job import run_job

        return run_job(config)
    # Heavy packages are imported only when a job runs, so that --help is fast.
    from quasar.console import Reporter
    from quasar.experiment import run
    from quasar.results.wandb.live import logged

    folder, reporter = Path(HydraConfig.get().runtime.output_dir), Reporter()
    try:
        require_path("hydra.run.dir", HydraConfig.get().run.dir)
        settings = check(config)
        if settings.sweep.dry_run:
            raise RequestError("sweep.dry_run=true: lists the jobs of a sweep, and this is a single run; use -m")
        with logged(settings.logger, folder, reporter):
            run.run(config, folder, sys.argv, reporter)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except QuasarError as error:
        return report(error)
    return DONE
