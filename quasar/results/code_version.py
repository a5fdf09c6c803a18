"""Which code computed a result: one hash over the program's sources."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("quasar", "kernels")
_SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh", ".jsonl")


@cache
def code_version() -> str:
    """Twelve hex digits over every source file of the packages, as they were when first asked for.

    The same in a checkout, with or without git, and where the packages were copied: it tells uncommitted edits apart.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((_ROOT / package).rglob("*")):
            if file.suffix in _SUFFIXES and file.is_file():
                digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
