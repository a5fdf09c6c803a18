"""A compiled library carries its key and its checksum behind its last byte, where the dynamic loader does not look."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_MARK = b"\nquasar_kernels "


def seal(library: Path, key: str) -> None:
    """Append the key and the checksum of a complete library to it."""
    content = library.read_bytes()
    card = json.dumps({"key": key, "sha256": hashlib.sha256(content).hexdigest()})
    with library.open("ab") as stream:
        stream.write(_MARK + card.encode())


def is_whole(library: Path, key: str) -> bool:
    """Whether the library is complete, unchanged, and the one of this key. It must not be loaded otherwise."""
    content, mark, card = library.read_bytes().rpartition(_MARK)
    try:
        expected = {"key": key, "sha256": hashlib.sha256(content).hexdigest()}
        return bool(mark) and json.loads(card) == expected
    except ValueError:
        return False
