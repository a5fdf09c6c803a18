"""Starting the process beside a run, and saying in the end what became of it (``logger=wandb``)."""

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
from quasar.console import Reporter
from quasar.results.store import read_json
from quasar.results.wandb.log import sync_command
from quasar.results.wandb.process import OUTCOME, stamp
from quasar.results.wandb.target import FOLDER, choose_mode


@contextmanager
def logged(settings: LoggerConfig, folder: Path, reporter: Reporter) -> Iterator[None]:
    """Keep W&B up to date with the run in ``folder`` while the body carries it out; W&B's errors stay with W&B."""
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
        reporter.warning("logger=wandb: the package wandb is not installed; quasar wandb push can make up for it later")
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
        reporter.warning(f"logger=wandb: {error}; quasar wandb push can make up for it later")
        return None


def _finish(
    process: subprocess.Popen[bytes], settings: LoggerConfig, folder: Path, before: int, reporter: Reporter
) -> None:
    """Say what became of the W&B run, where that is known within ``logger.wait`` seconds.

    A server that has not answered by now is not waited for: the process goes on without the run.
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
    remedy = f"quasar wandb push {folder} makes the run again from its files"
    if "error" in outcome:
        reporter.warning(f"W&B: {outcome['error']}; {remedy}")
    elif not outcome.get("ended"):
        state = "still at work in the background" if process.poll() is None else "ended without a word"
        reporter.line(f"W&B: {state}; {remedy}")
    elif outcome["mode"] == "online":
        reporter.line(f"W&B: {outcome['url']}")
    else:
        reporter.line(f"W&B: offline; upload with: {sync_command(outcome)}")
