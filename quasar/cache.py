"""What is expensive to compute and kept between runs, each entry under everything that it depends on.

An entry of kind ``calibration``, say, is two files below ``$QUASAR_CACHE/calibration``: the content, and beside it its
key and checksum. Both are named by the hash of the key, so that other inputs make another entry and nothing is ever
replaced. What is read is checked against the checksum; an entry that does not fit is made anew, with one warning.
A process that makes an entry holds its lock, and others that need the same one wait. Where nothing can be written, the
run goes on without the cache, with one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import torch

LOCK_SECONDS = 3600.0
"""How long a process waits for another one that makes the same entry."""

_PACKAGES = ("quasar", "quasar_kernels")
_SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh", ".jsonl")

T = TypeVar("T")


@dataclass(frozen=True)
class Store(Generic[T]):
    """How values of one kind are kept. ``save`` and ``load`` may raise whatever a broken file makes them raise.

    kind:   the folder's name below `cache_folder`
    suffix: of the content's file, with the dot
    """

    kind: str
    suffix: str
    save: Callable[[T, Path], None]
    load: Callable[[Path], T]

    def get(self, key: Mapping[str, Any], device: torch.device, dtype: torch.dtype, make: Callable[[], T]) -> T:
        """The value of a key, made and kept if it is not there or does not fit its checksum.

        key: all that the value depends on, as JSON, besides device and dtype, the versions of torch and of this program

        Raises what ``make`` raises.
        """
        whole = {
            **key,
            "device": device_identity(device),
            "dtype": str(dtype),
            "torch": metadata.version("torch"),
            "code_version": code_version(),
        }
        text = json.dumps(whole, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        content = cache_folder() / self.kind / f"{name}{self.suffix}"
        with _locked(content) as writable:
            # The key in the file is compared too: a hash of 24 digits is a name, not a proof.
            found = self._read(content, json.loads(text))
            if found is not None:
                return found[0]
            value = make()
            if writable:
                self._write(content, value, text)
            return value

    def _read(self, content: Path, key: dict[str, Any]) -> tuple[T] | None:
        card = card_of(content)
        if not (content.exists() and card.exists()):
            return None  # never made, or its process died
        try:
            known = json.loads(card.read_text(encoding="utf-8"))
            if known["key"] != key:
                raise ValueError("it was made for another key")
            if known["sha256"] != _sha256(content):
                raise ValueError("its checksum does not fit")
            return (self.load(content),)
        except Exception as error:  # a damaged file may raise anything
            _warn(f"{content} is damaged ({error}); it is made anew")
            return None

    def _write(self, content: Path, value: T, key: str) -> None:
        scratch = content.with_name(f"{content.stem}.{os.getpid()}{self.suffix}")
        try:
            self.save(value, scratch)
            card = {"key": json.loads(key), "sha256": _sha256(scratch), "made": int(time.time())}
            # The card last: content without a card counts as not made.
            card_of(content).unlink(missing_ok=True)
            scratch.replace(content)
            unfinished = scratch.with_suffix(".card")
            unfinished.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(card_of(content))
        except OSError as error:
            _warn(f"{content.parent} takes no files ({error.strerror or error}); the run goes on without")
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def json_store(kind: str) -> Store[Any]:
    """A store of JSON values."""
    return Store(kind, ".json", _save_json, lambda file: json.loads(file.read_text(encoding="utf-8")))


def cache_folder() -> Path:
    """``$QUASAR_CACHE``, or the user's cache folder for Quasar."""
    # Its package imports torch, which ``run.py --help`` must not wait for.
    from quasar_kernels.folder import cache_folder

    return cache_folder()


def card_of(content: Path) -> Path:
    """The file that holds the key and checksum of an entry."""
    return content.with_suffix(".card")


@dataclass(frozen=True)
class Kind:
    """One kind of entries in the cache: calibration, trajectories, models, kernels, …"""

    name: str
    entries: int
    bytes: int


def kinds() -> list[Kind]:
    """What the cache holds, by kind, in alphabetical order."""
    folders = sorted(folder for folder in _children(cache_folder()) if folder.is_dir())
    return [Kind(folder.name, len(_entries(folder)), _bytes_below(folder)) for folder in folders]


def clear(kind: str | None = None) -> int:
    """Delete the entries of one kind, or all; the bytes that were freed. Raises ValueError for a kind it has not.

    An entry that a running process is making stays, with its lock.
    """
    names = [found.name for found in kinds()]
    if kind is not None and kind not in names:
        raise ValueError(f"cache kind {kind!r}: there are {', '.join(names) or 'none yet'}")
    freed = 0
    for name in [kind] if kind is not None else names:
        folder = cache_folder() / name
        busy = {lock.stem for lock in folder.glob("*.lock") if _is_held(lock)}
        for entry in _children(folder):
            if entry.name.split(".", 1)[0] in busy or entry.stem in busy:
                continue
            freed += _bytes_below(entry) if entry.is_dir() else entry.stat().st_size
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return freed


def device_identity(device: torch.device) -> str:
    """What tells apart devices on which the same computation may round differently: a GPU's model, a CPU's kernels."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from quasar_kernels.cpu import backend

    library = backend()
    return f"{device.type}, {'no' if library is None else library.level.name} kernels"


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


@contextmanager
def _locked(content: Path) -> Iterator[bool]:
    """Hold the entry's lock; whether the entry can be written."""
    lock = FileLock(content.with_suffix(".lock"))
    try:
        content.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except (OSError, Timeout) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        _warn(f"{content.parent} takes no files ({reason}); the run goes on without")
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _save_json(value: Any, file: Path) -> None:
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _warn(message: str) -> None:
    warnings.warn(f"cache: {message}", RuntimeWarning, stacklevel=4)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in _children(folder) if entry.suffix not in (".lock", ".card")]


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        # Files may vanish meanwhile.
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
