"""Reads run folders, including incomplete ones that a killed job or a full disk left behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quasar.results.attempt import Status
from quasar.results.files import read_json
from quasar.results.generations import GENERATIONS
from quasar.results.schema import Json
from quasar.results.store import LOCK, read_status

STATES = ("done", "running", "partial", "failed", "pending")
"""The states of a run.

running: a process is working on it
partial: it has begun, but no process is working on it
pending: a sweep has submitted it, but it has not begun
"""
MANIFEST = "sweep.json"

# Both are safe: they build no other objects than lists, mappings, texts and numbers.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class StoredRun:
    """The content of a run's folder.

    config: the resolved configuration; empty if the run ended before it was written
    summary: the content of summary.json; empty if the run is not done
    prompts, total: number of finished prompts and of all prompts; the latter is None if unknown
    overrides: command-line overrides of a sweep's job
    """

    folder: Path
    status: str
    error: str | None = None
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    machines: tuple[str, ...] = ()
    code_versions: tuple[str, ...] = ()
    config_hash: str | None = None
    prompts: int = 0
    total: int | None = None
    overrides: tuple[str, ...] = ()


def read_run(folder: Path, overrides: tuple[str, ...] = ()) -> StoredRun:
    """Read a run from its files. Missing or damaged files make it partial or failed; this function never raises."""
    status = read_status(folder)
    config = read_config(folder / "config.yaml")
    summary = read_json(folder / "summary.json")
    state, error = _state(folder, status, config, summary)
    if state != "done" or summary is None:
        summary = {}
    prompts, total = (summary["prompts"],) * 2 if "prompts" in summary else _progress(folder)
    return StoredRun(
        folder=folder,
        status=state,
        error=error,
        config=config or {},
        summary=summary,
        machines=tuple(status.machines) if status else (),
        code_versions=tuple(status.code_versions) if status else (),
        config_hash=status.config_hash if status else None,
        prompts=prompts,
        total=total,
        overrides=overrides,
    )


def run_folders(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield every run folder below and including ``root`` in natural order, with the overrides of a sweep's job.

    Jobs that a sweep has submitted but that have not begun are included.
    """
    found: dict[Path, tuple[str, ...]] = {}
    for path, folders, files in os.walk(root):
        folder = Path(path)
        if MANIFEST in files:
            for job in (read_json(folder / MANIFEST) or {}).get("jobs", []):
                found[folder / job["folder"]] = tuple(job["overrides"])
        if LOCK in files or "status.json" in files:
            found.setdefault(folder, ())
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("conf", "wandb")]
    yield from sorted(found.items(), key=lambda item: _natural(item[0]))


def is_locked(folder: Path) -> bool:
    """Whether a process is working on the run. This check does not take the process's lock away."""
    try:
        with (folder / LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_config(file: Path) -> Json | None:
    """Return the configuration in a run's config.yaml; None if the file is missing or damaged."""
    try:
        written = file.read_bytes()
        content = yaml.load(written, Loader=_Loader)  # nosec B506
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def flatten(config: Json, prefix: str = "") -> dict[str, Any]:
    """Join nested keys by dots, as on the command line. Lists are not flattened."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _state(folder: Path, status: Status | None, config: Json | None, summary: Json | None) -> tuple[str, str | None]:
    if status is None:
        if not (folder / "status.json").exists() and config is None:
            return ("running" if is_locked(folder) else "pending"), None
        return "partial", "status.json is missing or damaged"
    if status.status == "done":
        missing = [name for name, content in (("summary.json", summary), ("config.yaml", config)) if content is None]
        return ("partial", f"{' and '.join(missing)} missing or damaged") if missing else ("done", None)
    if status.status == "failed":
        return "failed", status.error
    return (
        ("running", None) if is_locked(folder) else ("partial", "ended without an error: killed, or its machine failed")
    )


def _progress(folder: Path) -> tuple[int, int | None]:
    """Return the number of finished prompts, counted by complete lines, and the number of all prompts."""
    try:
        finished = (folder / GENERATIONS).read_bytes().count(b"\n")
    except OSError:
        finished = 0
    return finished, (read_json(folder / "environment.json") or {}).get("prompts")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts 10 after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]
