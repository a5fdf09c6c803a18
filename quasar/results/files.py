"""Files that other processes read and that a crash may interrupt: they are written as a whole, or by whole lines."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quasar.results.schema import Json


def read_json(file: Path) -> Json | None:
    """Return the JSON object in a file; None if the file is missing or contains no object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace a file's content by a JSON object, as `write_atomically` does. Raises OSError with the file's name."""
    write_atomically(file, _document(content))


def overwrite_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object over a file's content, which needs no room on the disk unless it is longer by blocks.

    Readers may see a part of it, so this is for a disk that is full. Raises OSError with the file's name.
    """
    data = _document(content).encode()
    with _named(file):
        descriptor = os.open(file, os.O_WRONLY)
        try:
            _write_all(descriptor, data)
            os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)


def write_atomically(file: Path, content: str) -> None:
    """Replace a file's content at once, so that readers see the old or the new content; if writing fails, the old.

    Raises OSError with the file's name.
    """
    # The name is random, because processes of several machines may have the same id.
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    with _named(file):
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append_line(file: Path, line: str) -> None:
    """Append a line and wait until it is on the disk; if that fails, the file is as it was.

    Raises OSError with the file's name.
    """
    with _named(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, f"{line}\n".encode())
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def _document(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Add the file's name to an OSError. Errors of a write do not have one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
