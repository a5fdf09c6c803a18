"""The command ``quasar wandb push``: logs all run folders below a folder to W&B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quasar.errors import RequestError
from quasar.results.collect import Collector
from quasar.results.console import Reporter
from quasar.results.runs import StoredRun
from quasar.results.wandb.log import push, sync_command
from quasar.results.wandb.target import Target, choose_mode


def push_all(root: Path, given: dict[str, str], reporter: Reporter) -> int:
    """Push every run that has ended; return how many failed.

    given: values of `Target` that replace those in the runs' configurations

    Raises RequestError if there is no run to push or wandb is not installed.
    """
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise RequestError("the package wandb is not installed; pip install wandb") from None
    if given.get("mode", "auto") not in ("auto", "online", "offline"):
        raise RequestError(f"--mode={given['mode']}: must be one of auto, online, offline")
    ended = [run for run in Collector(root).runs() if run.status not in ("running", "pending")]
    if not ended:
        raise RequestError(f"{root}: contains no run that has ended")
    failed, offline, reached = 0, [], True
    for run in ended:
        target = _target(run, given)
        mode = choose_mode(target.mode) if reached else "offline"
        try:
            place = push(run.folder, replace(target, mode=mode))
        except Exception as error:
            reporter.warning(f"{run.folder}: {type(error).__name__}: {error}")
            failed += 1
            continue
        # If the server could not be reached once, later runs do not try again: every attempt takes half a minute.
        reached = reached and place["mode"] == mode
        if place["mode"] == "online":
            reporter.line(f"{run.folder}: {place['url']}")
        else:
            offline.append(sync_command(place))
    for command in offline:
        reporter.line(command)
    reporter.line(f"{len(ended) - failed} of {len(ended)} runs pushed" + (", offline" if offline else ""))
    return failed


def _target(run: StoredRun, given: dict[str, str]) -> Target:
    """Return the target in the run's configuration, with the given values replaced."""
    own = run.config.get("logger", {})
    known = {key: own[key] for key in ("mode", "project", "entity") if own.get(key) is not None}
    return Target(**{**known, **given}, tags=tuple(own.get("tags", ())))
