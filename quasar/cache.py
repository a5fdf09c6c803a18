"""The cache of results that are expensive to compute. The key of an entry contains everything that it depends on.

For example, an entry of the kind ``calibration`` consists of two files in ``$QUASAR_CACHE/calibration``: the content,
and a card with the key and the checksum. Both are named by the hash of the key, so that different inputs have different
entries, and no entry is ever replaced. The checksum is verified when an entry is read. A damaged entry is computed
again, with a warning. A process that computes an entry holds its lock, and other processes that need the entry wait.
If the cache folder is not writable, values are kept in memory, with a warning.
"""

from __future__ import annotations

import contextlib
import copy
import functools
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
"""How long a process waits for another process that computes the same entry."""

_PACKAGES = ("quasar", "quasar_kernels")
_SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh", ".jsonl")

T = TypeVar("T")

_in_memory: dict[Path, Any] = {}
"""Values that could not be written, by the file that they belong to."""


@dataclass(frozen=True)
class Store(Generic[T]):
    """Stores the values of one kind.

    kind:   name of the folder in `cache_folder`
    suffix: suffix of the content files, with the dot
    save, load: write and read a value; ``load`` may raise any exception for a damaged file
    fits_memory: whether values are kept in memory if the cache folder is not writable
    """

    kind: str
    suffix: str
    save: Callable[[T, Path], None]
    load: Callable[[Path], T]
    fits_memory: bool = True

    def get(self, key: Mapping[str, Any], device: torch.device, dtype: torch.dtype, make: Callable[[], T]) -> T:
        """Return the value of a key. If it is missing or damaged, ``make`` computes it, and it is stored.

        Errors of ``make`` are passed on.

        key: everything that the value depends on, as JSON values. Device, dtype and the versions of torch and of the
            code are added
        """
        text = whole_key(key, device, dtype)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        content = cache_folder() / self.kind / f"{name}{self.suffix}"
        with _locked(content) as writable:
            # The stored key is compared too, because two keys might have the same hash of 24 digits.
            found = self._read(content, json.loads(text))
            if found is not None:
                return found[0]
            if content in _in_memory:
                return copy.deepcopy(_in_memory[content])
            value = make()
            if (not writable or not self._write(content, value, text)) and self.fits_memory:
                _in_memory[content] = copy.deepcopy(value)
            return value

    def _read(self, content: Path, key: dict[str, Any]) -> tuple[T] | None:
        card = card_of(content)
        if not (content.exists() and card.exists()):
            return None  # it was never computed, or the process died
        try:
            known = json.loads(card.read_text(encoding="utf-8"))
            if known["key"] != key:
                raise ValueError("it belongs to another key")
            if known["sha256"] != _sha256(content):
                raise ValueError("its checksum is wrong")
            return (self.load(content),)
        except Exception as error:  # a damaged file may raise anything
            _warn(f"{content} is damaged ({error}); it is computed again")
            return None

    def _write(self, content: Path, value: T, key: str) -> bool:
        """Write the value and its card; return whether this succeeded. The caller holds the entry's lock."""
        scratch = content.with_name(f"{content.stem}.{os.getpid()}{self.suffix}")
        try:
            # A process that was killed while it wrote this entry left its file.
            for leftover in content.parent.glob(f"{content.stem}.*.*"):
                leftover.unlink()
            self.save(value, scratch)
            card = {"key": json.loads(key), "sha256": _sha256(scratch), "made": int(time.time())}
            # The card is written last, because content without a card is treated as missing.
            card_of(content).unlink(missing_ok=True)
            scratch.replace(content)
            unfinished = scratch.with_suffix(".card")
            unfinished.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(card_of(content))
            return True
        except OSError as error:
            _warn(f"{content.parent} is not writable ({error.strerror or error}); the run continues without the cache")
            return False
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def whole_key(key: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    """Return the key of a value as JSON, with device, dtype and the versions of torch and of the code."""
    whole = {
        **key,
        "device": device_identity(device),
        "dtype": str(dtype),
        "torch": metadata.version("torch"),
        "code_version": code_version(),
    }
    return json.dumps(whole, sort_keys=True)


FOLDER_CARD = ".card"
"""Name of the card in an entry that is a folder, such as a converted model."""


def seal_folder(folder: Path) -> None:
    """Write the checksums of all files into a complete folder."""
    card = {"sha256": _checksums(folder)}
    (folder / FOLDER_CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def folder_is_whole(folder: Path) -> bool:
    """Whether a folder of the cache exists and has the files that `seal_folder` saw. Warns if it is damaged."""
    if not folder.is_dir():
        return False
    card = folder / FOLDER_CARD
    if not card.exists():
        # An earlier version of the code made it. From now on it is compared with what it is now.
        with contextlib.suppress(OSError):
            seal_folder(folder)
        return True
    try:
        known, found = json.loads(card.read_text(encoding="utf-8"))["sha256"], _checksums(folder)
        different = [name for name in {**known, **found} if known.get(name) != found.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        different = [FOLDER_CARD]
    if different:
        _warn(f"{folder} is damaged ({', '.join(different[:5])}); it is made again")
    return not different


def _checksums(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != FOLDER_CARD)
    return {str(file.relative_to(folder)): sha256_of(file) for file in files}


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file. A process reads a large file only once for it, unless the file has changed since
    then in size or in its time of modification.
    """
    found = file.stat()
    return _sha256_of_version(file, found.st_size, found.st_mtime_ns)


def json_store(kind: str) -> Store[Any]:
    """Return a store of JSON values."""
    return Store(kind, ".json", _save_json, lambda file: json.loads(file.read_text(encoding="utf-8")))


def cache_folder() -> Path:
    """Return ``$QUASAR_CACHE``, or by default the user's cache folder for Quasar."""
    # The package imports torch, which would slow down ``run.py --help``.
    from quasar_kernels.folder import cache_folder

    return cache_folder()


def card_of(content: Path) -> Path:
    """Return the path of the card, the file with the key and the checksum of an entry."""
    return content.with_suffix(".card")


@dataclass(frozen=True)
class Kind:
    """A kind of entries in the cache (calibration, trajectories, models, kernels, …), their number and size."""

    name: str
    entries: int
    bytes: int


def kinds() -> list[Kind]:
    """Return the kinds in the cache in alphabetical order."""
    folders = sorted(folder for folder in _children(cache_folder()) if folder.is_dir())
    return [Kind(folder.name, len(_entries(folder)), bytes_below(folder)) for folder in folders]


def clear(kind: str | None = None) -> int:
    """Delete the entries of one kind, or of all kinds, and return the number of freed bytes.

    Entries that a running process is computing are not deleted. Raises ValueError for an unknown kind.
    """
    names = [found.name for found in kinds()]
    if kind is not None and kind not in names:
        raise ValueError(f"cache kind {kind!r} does not exist; existing kinds: {', '.join(names) or 'none'}")
    freed = 0
    for name in [kind] if kind is not None else names:
        folder = cache_folder() / name
        busy = {lock.stem for lock in folder.glob("*.lock") if _is_held(lock)}
        for entry in _children(folder):
            if entry.name.split(".", 1)[0] in busy or entry.stem in busy:
                continue
            freed += bytes_below(entry) if entry.is_dir() else entry.stat().st_size
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return freed


def bytes_below(folder: Path) -> int:
    """Return the size of all files in a folder and its subfolders. Files that disappear meanwhile do not count."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def device_identity(device: torch.device) -> str:
    """Return the name of a GPU, or the level of the CPU kernels. Devices with another name may round differently."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from quasar_kernels.cpu import backend

    library = backend()
    return f"{device.type}, {'no' if library is None else library.level.name} kernels"


@cache
def code_version() -> str:
    """Return a hash of twelve hex digits over all source files of the packages, read at the first call.

    It does not depend on git or on the location of the packages, and it changes with uncommitted edits.
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
    """Hold the entry's lock. Yields whether the entry can be written."""
    lock = FileLock(content.with_suffix(".lock"))
    try:
        content.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except (OSError, Timeout) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        _warn(f"{content.parent} is not writable ({reason}); the run continues without the cache")
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


@functools.lru_cache(maxsize=1024)
def _sha256_of_version(file: Path, size: int, changed: int) -> str:
    return _sha256(file)


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
