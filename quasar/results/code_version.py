"""Which code computed a result: one hash over the program's sources."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

_PACKAGES = ("quasar", "quasar_kernels")
_SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh", ".jsonl")


@cache
def code_version() -> str:
    """Twelve hex digits over every source file of the packages, as they were when first asked for.

    The same in a checkout, with or without git, and where the packages were copied: it tells uncommitted edits apart.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        for file in sorted(folder.rglob("*")):
            if file.suffix in _SUFFIXES and file.is_file():
                name = f"{package}/{file.relative_to(folder)}"
                digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
