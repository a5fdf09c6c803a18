"""Plans a sweep: compares every job with the results of earlier attempts in the sweep's folder."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from quasar.cache import code_version
from quasar.config.schema import RunConfig
from quasar.errors import RequestError
from quasar.results.files import read_json, write_json
from quasar.results.runs import MANIFEST, StoredRun, read_run
from quasar.results.schema import Json

SUPERSEDED = ".superseded"
"""Name of the folder, in a sweep's folder, for results that were computed by other versions of the code."""
LOCK = ".sweep.lock"


@dataclass(frozen=True)
class Request:
    """A job that the command line requests. settings: its checked configuration."""

    overrides: tuple[str, ...]
    config_hash: str
    settings: RunConfig


@dataclass(frozen=True)
class Job:
    """A request and the action planned for it.

    folder: name of its folder in the sweep's folder
    action: new | continue (after its last finished prompt) | again (it failed) | done | running | same (as another job)
    replaces: whether the folder contains results of another version of the code, which are moved away first
    """

    request: Request
    folder: str
    action: str
    stored: StoredRun | None = None
    replaces: bool = False

    @property
    def launches(self) -> bool:
        return self.action in ("new", "continue", "again")


@contextmanager
def planning(root: Path) -> Iterator[None]:
    """Hold the lock of the sweep's folder, so that sweeps that begin in it at once give their jobs separate folders."""
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):
        yield


def plan(requests: Sequence[Request], root: Path, resume: bool, any_code: bool) -> list[Job]:
    """Plan the jobs of a sweep in ``root``. A job is identified by its configuration hash and the version of the code.

    any_code: also accept finished results that were computed by other versions of the code

    Raises RequestError if the folder already contains a sweep and ``resume`` is off.
    """
    known = {entry["config_hash"]: entry["folder"] for entry in _entries(root)}
    if known and not resume:
        raise RequestError(
            f"{root} already contains a sweep; pass resume=true to continue it, or another hydra.sweep.dir"
        )
    numbers = _free_numbers(root, set(known.values()))
    jobs: list[Job] = []
    planned: dict[str, str] = {}
    for request in requests:
        key = request.config_hash
        if key in planned:
            jobs.append(Job(request, planned[key], "same"))
            continue
        job = _known(request, root, known[key], any_code) if key in known else Job(request, str(next(numbers)), "new")
        planned[key] = job.folder
        jobs.append(job)
    return jobs


def begin(jobs: Sequence[Job], root: Path, command: Sequence[str]) -> None:
    """Prepare the sweep's folder: move replaced results away and write the list of jobs."""
    root.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        if job.replaces and (root / job.folder).exists():
            put_aside(root, job.folder)
    entries = {entry["config_hash"]: entry for entry in _entries(root)}
    for job in jobs:
        entries[job.request.config_hash] = {
            "folder": job.folder,
            "overrides": list(job.request.overrides),
            "config_hash": job.request.config_hash,
        }
    manifest = {
        "jobs": list(entries.values()),
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(command),
        "code_version": code_version(),
    }
    write_json(root / MANIFEST, manifest)


def newest_sweep(root: Path, hashes: Iterable[str]) -> Path | None:
    """Return the newest sweep in the parent folder of ``root`` that has any of these jobs; None if there is none."""
    wanted = set(hashes)
    found = [
        file.parent
        for file in root.parent.glob(f"*/{MANIFEST}")
        if wanted & {entry["config_hash"] for entry in _entries(file.parent)}
    ]
    return max(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime, default=None)


def put_aside(root: Path, folder: str) -> None:
    target = root / SUPERSEDED / f"{folder}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / folder).rename(target)


def summary_line(jobs: Sequence[Job]) -> str:
    """Return one line such as ``12 jobs: 7 done already, 1 to continue, 4 to begin``."""
    words = {
        "done": "done already",
        "running": "running elsewhere",
        "same": "identical to another job",
        "continue": "to continue",
        "again": "failed, to run again",
        "new": "to begin",
    }
    counts = Counter(job.action for job in jobs)
    parts = [f"{counts[action]} {text}" for action, text in words.items() if counts[action]]
    replaced = sum(job.replaces for job in jobs)
    note = f" ({replaced} have results of other code versions; sweep.any_code=true keeps those)" if replaced else ""
    return f"{len(jobs)} jobs: {', '.join(parts)}{note}"


def _known(request: Request, root: Path, folder: str, any_code: bool) -> Job:
    stored = read_run(root / folder, request.overrides)
    if stored.status == "running":
        return Job(request, folder, "running", stored)
    other_code = bool(set(stored.code_versions) - {code_version()})
    # An unfinished job is never continued by other code, because its results would be mixed.
    if other_code and not (any_code and stored.status == "done"):
        return Job(request, folder, "new", stored, replaces=True)
    actions = {"done": "done", "failed": "again", "pending": "new", "partial": "continue"}
    return Job(request, folder, actions[stored.status], stored)


def _entries(root: Path) -> list[Json]:
    entries = (read_json(root / MANIFEST) or {}).get("jobs", [])
    return [entry for entry in entries if isinstance(entry, dict)]


def _free_numbers(root: Path, taken: set[str]) -> Iterator[int]:
    return (number for number in range(10**9) if str(number) not in taken and not (root / str(number)).exists())
