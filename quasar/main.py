"""The command line of ``run.py``: Hydra composes, `quasar.experiment` runs, errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from quasar.config import CONF, register
from quasar.errors import QuasarError

DONE, WRONG_REQUEST, INTERRUPTED = 0, 2, 130


def main() -> int:
    """Run what ``sys.argv`` asks for; the exit code is the worst of its jobs'."""
    register()
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> None:
        codes.append(_run(config))

    try:
        job()
    except SystemExit as stop:
        # Hydra has said what is wrong with the request before any job started.
        return WRONG_REQUEST if stop.code and not codes else int(stop.code or DONE)
    except KeyboardInterrupt:
        return INTERRUPTED
    return max(codes, default=DONE)


def _run(config: DictConfig) -> int:
    # Heavy imports wait until a job runs, so that --help answers at once.
    from quasar import experiment
    from quasar.console import Reporter

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        experiment.run(config, folder, sys.argv, Reporter())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except QuasarError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return DONE
