"""The command line of ``run.py``: composes the configuration, executes the run, and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal import hydra as hydra_commands
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from quasar.config.rules import check, require_path
from quasar.config.schema import CONF, register
from quasar.errors import RequestError, report
from quasar.experiment.entry import INTERRUPTED
from quasar.experiment.memory import release_memory
from quasar.experiment.sweep.ending import SweepEnded

DONE, WRONG_REQUEST = 0, 2


def main() -> int:
    """Execute the run or sweep in ``sys.argv`` and return the exit code, the largest one of all jobs."""
    register()
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> int:
        # A job of a sweep may run in another process, which gets the code as the return value.
        try:
            codes.append(_run(config))
        finally:
            release_memory()
        return codes[-1]

    try:
        with _errors_raised():
            job()
    except SweepEnded as ended:
        return ended.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else WRONG_REQUEST if stop.code else DONE
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader of the help text has closed the pipe.
        return DONE
    except Exception as error:
        return _report(error)
    return max(codes, default=DONE)


def _run(config: DictConfig) -> int:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from quasar.experiment.sweep.job import run_job

        return run_job(config)
    # Heavy packages are imported only when a job runs, so that --help is fast.
    from quasar.experiment import run
    from quasar.results.console import Reporter
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
        return _interrupted()
    except Exception as error:
        return _report(error)
    return DONE


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def _report(error: Exception) -> int:
    """Print an error and return its exit code. An error of Hydra or OmegaConf means that the request was wrong."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return report(error)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    print(error, file=sys.stderr)
    if isinstance(error.__cause__, OmegaConfBaseException):
        print(error.__cause__, file=sys.stderr)
    return WRONG_REQUEST


@contextmanager
def _errors_raised() -> Iterator[None]:
    """Make Hydra raise errors. It would print tracebacks and exit with 1 for a wrong request and a full disk alike."""

    def call(function: Callable[[], Any]) -> Any:
        return function()

    modules: tuple[Any, ...] = (hydra_utils, hydra_commands)
    before = [module.run_and_report for module in modules]
    try:
        for module in modules:
            module.run_and_report = call
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.run_and_report = function
