"""The command ``quasar wandb push``: logs all run folders below a folder to W&B, and a summary of every sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from quasar.errors import RequestError
from quasar.results.collect import Collector
from quasar.results.console import Reporter
from quasar.results.runs import MANIFEST, StoredRun
from quasar.results.schema import Json
from quasar.results.wandb.log import push, sync_command
from quasar.results.wandb.sweep import push_sweep
from quasar.results.wandb.target import Target, choose_mode


def push_all(root: Path, given: dict[str, str], reporter: Reporter) -> int:
    """Push every run that has ended, and a summary of every sweep that they belong to; return how many failed.

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
    pusher = _Pusher(reporter)
    for run in ended:
        pusher.push(run.folder, _target(run, given), partial(push, run.folder))
    failed = pusher.failed
    sweeps = _sweeps(ended)
    for sweep, members in sweeps.items():
        runs = Collector(sweep).runs()
        pusher.push(sweep, _target(members[0], given), partial(push_sweep, sweep, runs))
    for command in pusher.offline:
        reporter.line(command)
    offline = ", offline" if pusher.offline else ""
    reporter.line(f"{len(ended) - failed} of {len(ended)} runs pushed{offline}")
    if sweeps:
        reporter.line(f"{len(sweeps) - (pusher.failed - failed)} of {len(sweeps)} summaries of sweeps pushed{offline}")
    return pusher.failed


@dataclass
class _Pusher:
    """Pushes one W&B run after the other and counts those that fail.

    offline: the commands that upload what was written offline
    reached: whether the server has answered so far. If it could not be reached once, later runs do not try again,
        because every attempt takes half a minute
    """

    reporter: Reporter
    failed: int = 0
    offline: list[str] = field(default_factory=list)
    reached: bool = True

    def push(self, folder: Path, target: Target, pushed: Callable[[Target], Json]) -> None:
        mode = choose_mode(target.mode) if self.reached else "offline"
        try:
            place = pushed(replace(target, mode=mode))
        except Exception as error:
            self.reporter.warning(f"{folder}: {type(error).__name__}: {error}")
            self.failed += 1
            return
        self.reached = self.reached and place["mode"] == mode
        if place["mode"] == "online":
            self.reporter.line(f"{folder}: {place['url']}")
        else:
            self.offline.append(sync_command(place))


def _sweeps(runs: list[StoredRun]) -> dict[Path, list[StoredRun]]:
    """Return the folders of the sweeps that runs belong to, each with its runs."""
    found: dict[Path, list[StoredRun]] = {}
    for run in runs:
        folder = next((parent for parent in run.folder.absolute().parents if (parent / MANIFEST).exists()), None)
        if folder is not None:
            found.setdefault(folder, []).append(run)
    return found


def _target(run: StoredRun, given: dict[str, str]) -> Target:
    """Return the target in the run's configuration, with the given values replaced."""
    own = run.config.get("logger", {})
    known = {key: own[key] for key in ("mode", "project", "entity") if own.get(key) is not None}
    return Target(**{**known, **given}, tags=tuple(own.get("tags", ())))
