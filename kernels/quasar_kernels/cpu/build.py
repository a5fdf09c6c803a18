"""Compiles the kernels, once for every version of the sources, compiler and ISA level."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from quasar_kernels.cpu.levels import Level
from quasar_kernels.cpu.seal import is_whole, seal
from quasar_kernels.folder import cache_folder

SOURCES = Path(__file__).parent
# The reference rounds products and sums separately, so they must not be contracted to fused ones. Without the
# alignments any change in the sources moves the hot loops, and the time of a step changes by up to 5 %. -w is needed
# because GCC warns about registers that its own headers leave undefined on purpose.
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-w"),
    *("-falign-functions=64", "-falign-loops=32"),
)
COMPILE_TIMEOUT_SECONDS = 300
# Part of the file names, so that a library without a checksum is not taken for a damaged one.
SEALED = b"sealed"


class BuildError(Exception):
    """Raised if the kernels cannot be compiled on this machine. The message gives the reason in one line."""


def library_path(level: Level) -> Path:
    """Return the path of the shared library of a level. It is compiled if no earlier process has done so.

    If several processes call this at the same time, one compiles and the others wait. A library appears under its name
    only when it is complete. It is verified before it is used, and compiled again, with a warning, if it is damaged. If
    there is no compiler, a library that any compiler has built from these sources is used. If the cache folder is not
    writable, the library is compiled into a temporary folder, with a warning. Raises BuildError.
    """
    folder = cache_folder() / "kernels"
    sources = _digest(*(source.read_bytes() for source in _source_files("*")), " ".join(_flags(level)).encode(), SEALED)
    try:
        command, version = compiler()
    except BuildError:
        for library in sorted(folder.glob(f"{level.name}-{sources}-*.so")):
            if _usable(library):
                return library
        raise
    library = folder / f"{level.name}-{sources}-{_digest(version)}.so"
    try:
        if _usable(library):
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            # Another process may have compiled it meanwhile.
            if not (library.exists() and is_whole(library, library.stem)):
                _sweep(library)
                _compile(command, level, library)
    except OSError as error:
        _warn(
            f"{folder} is not writable ({error.strerror or error}); the CPU kernels are compiled for this process only"
        )
        library = _temporary_folder() / library.name
        if not library.exists():
            _compile(command, level, library)
    return library


def compiler() -> tuple[list[str], bytes]:
    """Return the command of the C++ compiler and the text of its version. Raises BuildError if there is none."""
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
    else:
        found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
        if found is None:
            raise BuildError("no C++ compiler found; install g++ or clang++, or name one in CXX")
        command = [found]
    return command, _run([*command, "--version"])


def _usable(library: Path) -> bool:
    """Whether the library is there and whole. Warns if it is damaged: loading it could end the process."""
    if not library.exists():
        return False
    if is_whole(library, library.stem):
        return True
    _warn(f"{library} is damaged; it is compiled again")
    return False


def _sweep(library: Path) -> None:
    """Remove what a killed build of this library left. The caller holds the library's lock."""
    for leftover in library.parent.glob(f"{library.stem}.*/"):
        shutil.rmtree(leftover, ignore_errors=True)


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="quasar-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(compiler: list[str], level: Level, library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{library.stem}.", dir=library.parent) as scratch:
        units = _source_files("*.cpp")
        objects = [Path(scratch) / f"{unit.stem}.o" for unit in units]
        commands = [
            [*compiler, *_flags(level), "-c", str(unit), "-o", str(target)]
            for unit, target in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        complete = Path(scratch) / library.name
        _run([*compiler, *_flags(level), "-shared", *map(str, objects), "-o", str(complete)])
        seal(complete, library.stem)
        complete.replace(library)


def _warn(message: str) -> None:
    warnings.warn(f"cache: {message}", RuntimeWarning, stacklevel=4)


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {reason}")
    return done.stdout


def _flags(level: Level) -> tuple[str, ...]:
    return (*FLAGS, *level.flags)


def _source_files(pattern: str) -> list[Path]:
    return sorted(path for path in SOURCES.glob(pattern) if path.suffix in {".cpp", ".h"})


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
