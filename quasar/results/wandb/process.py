"""The process that logs a run to W&B while it runs: ``python -m quasar.results.wandb.process FOLDER …``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from quasar.results.files import write_atomically
from quasar.results.runs import read_run
from quasar.results.schema import Json
from quasar.results.wandb.log import POLL_SECONDS, push
from quasar.results.wandb.target import FOLDER, Target

OUTCOME = "outcome.json"
"""File in a run's W&B folder with the outcome of logging."""
BEGIN_SECONDS = 3600.0
# If wandb hangs, this process ends itself so many seconds after the run has ended.
LAST_SECONDS = 900.0


def stamp(folder: Path) -> int:
    """Return when status.json was last written, which happens when a run begins and when it ends; 0 if never."""
    try:
        return (folder / "status.json").stat().st_mtime_ns
    except OSError:
        return 0


def main(arguments: Sequence[str]) -> None:
    """Wait until the run begins, log it until it ends, and write the outcome."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--before", type=int, required=True, help="stamp of the run before this attempt")
    parser.add_argument("--target", type=json.loads, required=True)
    chosen = parser.parse_args(arguments)
    # The threads of the run have priority.
    os.nice(19)
    if not _begun(chosen.folder, chosen.parent, chosen.before):
        return
    directory = chosen.folder / FOLDER

    def tell(outcome: Json, ended: bool = False) -> None:
        write_atomically(directory / OUTCOME, json.dumps({**outcome, "ended": ended}) + "\n")

    try:
        directory.mkdir(exist_ok=True)
        _adopt_agents_id(directory)
        watchdog = threading.Thread(target=_end_late, args=(chosen.folder,), daemon=True)
        watchdog.start()
        target = Target(**{**chosen.target, "tags": tuple(chosen.target["tags"])})
        tell(push(chosen.folder, target, tell), ended=True)
    except Exception as error:
        tell({"error": _without_key(f"{type(error).__name__}: {error}")}, ended=True)


def _begun(folder: Path, parent: int, before: int) -> bool:
    """Wait until the run has begun. Return False if its process ends without beginning it, or after `BEGIN_SECONDS`."""
    deadline = time.monotonic() + BEGIN_SECONDS
    while (alive := os.getppid() == parent and time.monotonic() < deadline) and stamp(folder) == before:
        time.sleep(0.2)
    return alive or stamp(folder) != before


def _without_key(message: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return message.replace(key, "(key)") if key else message


def _end_late(folder: Path) -> None:
    while read_run(folder).status == "running":
        time.sleep(POLL_SECONDS)
    time.sleep(LAST_SECONDS)
    os._exit(1)


def _adopt_agents_id(directory: Path) -> None:
    """Store the id that a W&B sweep agent chose, because the agent looks for the run under this id."""
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        write_atomically(directory / "id", os.environ["WANDB_RUN_ID"])


if __name__ == "__main__":
    main(sys.argv[1:])
