"""Reading run folders back, whatever state a killed job or a full disk left them in."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quasar.results.generations import GENERATIONS
from quasar.results.schema import Json, Status
from quasar.results.store import LOCK, read_json, read_status

STATES = ("done", "running", "partial", "failed", "pending")
"""running: a process is at work on it; partial: begun, and nobody is any more; pending: of a sweep, not begun."""
MANIFEST = "sweep.json"

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class StoredRun:
    """What a run's folder holds. ``overrides``: of a sweep's job. ``prompts``: finished ones; total: None if unknown.

    config: the resolved configuration, empty where the run ended before it was written
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
    """A run from its files. Missing, cut and damaged files make it partial or failed; none of them raises."""
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
    """Every run folder below ``root``, itself included, in a natural order; with its overrides where a sweep tells.

    Jobs that a sweep has submitted and that have not begun are among them.
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
    """Whether a process is at work on the run; looks without touching the lock."""
    try:
        with (folder / LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_config(file: Path) -> Json | None:
    """The configuration in a run's config.yaml; None where there is none or it is damaged."""
    try:
        content = yaml.load(file.read_bytes(), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def flatten(config: Json, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as the command line writes them; lists stay whole."""
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
        ("running", None) if is_locked(folder) else ("partial", "ended without a word: killed, or its machine failed")
    )


def _progress(folder: Path) -> tuple[int, int | None]:
    """Finished prompts, by whole lines, and all of them."""
    try:
        finished = (folder / GENERATIONS).read_bytes().count(b"\n")
    except OSError:
        finished = 0
    return finished, (read_json(folder / "environment.json") or {}).get("prompts")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 10 after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]
