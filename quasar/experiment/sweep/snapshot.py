"""Copies conf/ for every submission, because Hydra reads the YAML files again when a queued job starts."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader

SNAPSHOTS = ".conf"
_SCHEME = "file://"


def freeze(loader: ConfigLoader, root: Path) -> None:
    """Copy every configuration folder that ``loader`` reads to ``root``/.conf, and make it read the copies.

    The name of a copy is the hash of its content, so that queued jobs of an earlier submission keep their own copy.
    """
    assert isinstance(loader, ConfigLoaderImpl)
    search_path = loader.get_search_path()
    for element in search_path.get_path():
        path = element.path or ""
        folder = Path(path.removeprefix(_SCHEME))
        if (path.startswith(_SCHEME) or folder.is_absolute()) and folder.is_dir():
            element.path = _SCHEME + str(_copy(folder, root / SNAPSHOTS))
    loader.repository.initialize_sources(search_path)


def _copy(folder: Path, snapshots: Path) -> Path:
    files = {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.yaml"))}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(str(name).encode() + b"\0" + content + b"\0")
    target = (snapshots / digest.hexdigest()[:12]).absolute()
    if target.exists():
        return target
    snapshots.mkdir(parents=True, exist_ok=True)
    # Other sweeps may begin in this folder at the same time.
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=snapshots) as temporary:
        unfinished = Path(temporary) / target.name
        for name, content in files.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target
