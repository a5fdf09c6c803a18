"""Starts the process that logs a run to W&B, and prints its outcome at the end (``logger=wandb``)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quasar.config.schema import LoggerConfig
from quasar.results.console import Reporter
from quasar.results.files import read_json
from quasar.results.wandb.log import sync_command
from quasar.results.wandb.process import OUTCOME, stamp
from quasar.results.wandb.target import FOLDER, choose_mode


@contextmanager
def logged(settings: LoggerConfig, folder: Path, reporter: Reporter) -> Iterator[None]:
    """Log the run in ``folder`` to W&B while the body executes it. Errors of W&B become warnings."""
    if settings.name != "wandb":
        yield
        return
    before = stamp(folder)
    process = _start(settings, folder, before, reporter)
    try:
        yield
    finally:
        if process is not None:
            _finish(process, settings, folder, before, reporter)


def _start(settings: LoggerConfig, folder: Path, before: int, reporter: Reporter) -> subprocess.Popen[bytes] | None:
    if settings.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
        return None
    if importlib.util.find_spec("wandb") is None:
        reporter.warning("logger=wandb: the package wandb is not installed; quasar wandb push can log the run later")
        return None
    target = {name: getattr(settings, name) for name in ("mode", "project", "entity")}
    target["tags"] = list(settings.tags)
    command = [sys.executable, "-m", "quasar.results.wandb.process", str(folder.absolute())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    try:
        (folder / FOLDER / OUTCOME).unlink(missing_ok=True)
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid()), "--before", str(before), "--target", json.dumps(target)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        reporter.warning(f"logger=wandb: {error}; quasar wandb push can log the run later")
        return None


def _finish(
    process: subprocess.Popen[bytes], settings: LoggerConfig, folder: Path, before: int, reporter: Reporter
) -> None:
    """Print the outcome of logging if it is known within ``logger.wait`` seconds.

    If the W&B server has not answered yet, this does not wait: the process continues in the background.
    """
    if stamp(folder) == before:
        # The run never began.
        process.kill()
        process.wait()
        return
    patient = choose_mode(settings.mode) == "offline" or (folder / FOLDER / OUTCOME).exists()
    deadline = time.monotonic() + (settings.wait if patient else 0)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    outcome = read_json(folder / FOLDER / OUTCOME) or {}
    remedy = f"quasar wandb push {folder} logs the run again from its files"
    if "error" in outcome:
        reporter.warning(f"W&B: {outcome['error']}; {remedy}")
    elif not outcome.get("ended"):
        state = "still uploading in the background" if process.poll() is None else "the logging process crashed"
        reporter.line(f"W&B: {state}; {remedy}")
    elif outcome["mode"] == "online":
        reporter.line(f"W&B: {outcome['url']}")
    else:
        reporter.line(f"W&B: offline; upload with: {sync_command(outcome)}")
