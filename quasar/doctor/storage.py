"""Checks of the disks that a run writes to, and of the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from quasar.cache import cache_folder, kinds
from quasar.doctor.finding import Finding

LOW_DISK, LEAST_DISK = 5e9, 2e8
"""Free bytes below which a model may not fit, and below which not even the records of a run do."""


def disks() -> Iterator[Finding]:
    yield _disk("results", Path("outputs"), "free some space there, or choose output_dir=FOLDER on another disk")
    yield _disk("cache's disk", cache_folder(), "free some space there, or set QUASAR_CACHE to a folder elsewhere")


def cache() -> Iterator[Finding]:
    folder = cache_folder()
    if not os.access(_existing(folder), os.W_OK | os.X_OK):
        found = f"{folder} is not writable; kernels, models and calibration are made again in every run"
        yield Finding("cache", "falls back", found, "set QUASAR_CACHE to a folder that you may write to")
        return
    kept = kinds()
    parts = ", ".join(f"{kind.name} {kind.bytes / 1e6:.0f}" for kind in kept if kind.bytes >= 5e5)
    total = sum(kind.bytes for kind in kept) / 1e6
    yield Finding("cache", "works", f"{folder}, {total:.0f} MB" + (f" ({parts})" if parts else ""))


def _disk(subject: str, folder: Path, remedy: str) -> Finding:
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free in {place.resolve()}"
    if subject == "results" and not os.access(place, os.W_OK | os.X_OK):
        return Finding(subject, "fails", f"{place.resolve()} is not writable", "choose output_dir=FOLDER elsewhere")
    if free < LEAST_DISK:
        return Finding(subject, "fails", found, remedy)
    return Finding(subject, "falls back" if free < LOW_DISK else "works", found, remedy if free < LOW_DISK else "")


def _existing(folder: Path) -> Path:
    """Return the folder, or the closest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
