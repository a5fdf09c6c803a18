"""Reads the files that users name: regular files, UTF-8 text, JSON and JSON lines.

Every function raises RequestError with one line that names the file, and the line and the remedy where there is one.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quasar.errors import RequestError

LINE_BYTES = 64 << 20
"""Largest line of a JSONL file. A line of this size is no prompt, and an endless one would fill the memory."""

TEXT_BYTES = 1 << 30
"""Largest text file that is read as a whole."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_APPLE_DOUBLE = b"\x00\x05\x16\x07"


def is_companion(file: Path) -> bool:
    """Whether macOS wrote the file beside another one to keep its attributes (``._name``). It holds no text."""
    return file.name.startswith("._")


def expanded(path: str, key: str) -> Path:
    """Return the path with ``~`` replaced. ``key`` is the configuration key for the message of a RequestError."""
    if not path.strip():
        raise RequestError(f"{key}={path!r}: is empty; pass a file or a folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RequestError(f"{key}={path}: {error}; write the home folder in full") from None


def kind_of(path: Path, key: str) -> str:
    """Return ``file`` or ``folder``. Raises RequestError for a missing path and for pipes, sockets and devices."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{key}={path}: no such file or folder") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{key}={str(path)[:200]}: cannot be read ({_reason(error)})") from None
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise RequestError(f"{key}={path}: is {_named(mode)}; pass a regular file or a folder")
    return "file"


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe is refused instead of waited for."""
    try:
        # Without O_NONBLOCK, opening a pipe waits until another process writes to it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: cannot be read ({_reason(error)})") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise RequestError(f"{file}: is {_named(mode)}; copy its content to a regular file and pass that")
    return os.fdopen(descriptor, "rb")


def read_text(file: Path) -> str:
    """Return the content of a UTF-8 text file without its byte order mark."""
    with open_regular(file) as stream:
        content = _read(stream, file, TEXT_BYTES + 1)
    if len(content) > TEXT_BYTES:
        raise RequestError(f"{file}: is larger than {TEXT_BYTES >> 20} MiB; pass a smaller file")
    _refuse_other_formats(content, str(file))
    return _decoded(content.removeprefix(codecs.BOM_UTF8), str(file))


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place (``file:line``) and the value of every line that is not blank.

    Lines end at ``\\n`` only. U+2028, U+2029 and U+0085 may stand in a JSON string, so they end no line.
    """
    with open_regular(file) as stream:
        number = 0
        while line := _read(stream, file, LINE_BYTES + 1, line=True):
            number += 1
            place = f"{file}:{number}"
            if number == 1:
                _refuse_other_formats(line, place)
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > LINE_BYTES:
                raise RequestError(f"{place}: the line is longer than {LINE_BYTES >> 20} MiB; one line is one object")
            text = _decoded(line, place)
            if text.strip(" \t\r\n"):
                yield place, parsed_json(text, place, "; every line must be one JSON object")


def parsed_json(text: str, place: str, remedy: str = "") -> Any:
    """Return the value of a JSON text.

    Python's own reader accepts NaN, repeated keys and lone surrogates, and fails with other exceptions than ValueError
    for deep nesting. All of these are a RequestError that names ``place``.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer
        )
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"{place}: contains half of a surrogate pair (\\ud800 to \\udfff), which is no text"
        ) from None
    except RecursionError:
        raise RequestError(f"{place}: is nested too deeply for JSON") from None
    except ValueError as error:
        raise RequestError(f"{place}: not valid JSON ({error}){remedy}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} occurs twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 100:
        raise ValueError(f"the number {text:.40}… has {len(text)} digits")
    return int(text)


def _read(stream: BinaryIO, file: Path, size: int, line: bool = False) -> bytes:
    try:
        return stream.readline(size) if line else stream.read(size)
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({_reason(error)})") from None


def _refuse_other_formats(start: bytes, place: str) -> None:
    for magic, (name, tool) in _COMPRESSED.items():
        if start.startswith(magic):
            raise RequestError(f"{place}: is compressed with {name}; decompress it first ({tool})")
    for mark, name in _WIDE.items():
        if start.startswith(mark):
            raise RequestError(f"{place}: is {name} text; convert it: iconv -f {name} -t UTF-8 OLD > NEW")
    if start.startswith(_APPLE_DOUBLE):
        raise RequestError(f"{place}: is a companion file of macOS without text; pass the file without the prefix ._")


def _decoded(content: bytes, place: str) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{place}: cannot be read as UTF-8 text (byte 0x{content[error.start]:02x} after {error.start} bytes); "
            "convert the file from its encoding, for example: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
        ) from None
    if "\0" in text:
        raise RequestError(
            f"{place}: contains NUL bytes, so it is binary, or UTF-16 without a mark (iconv -f UTF-16LE -t UTF-8)"
        )
    return text


def _named(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
