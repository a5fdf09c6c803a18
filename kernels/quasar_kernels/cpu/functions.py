"""Reads the signatures of the C interface from `functions.h`, which lists all functions, for ctypes."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

HEADER = Path(__file__).with_name("functions.h")
_TYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float}


class Signature(NamedTuple):
    """The ctypes type of every argument, and the index of the argument that is the number of rows; None without one."""

    arguments: tuple[type, ...]
    rows: int | None


def read_signatures(header: str) -> dict[str, Signature]:
    """Return every ``FUNCTION(name, arguments...)`` of a header by name. Raises KeyError for an unknown type.

    >>> read_signatures("FUNCTION(twice, const float *x, int64_t rows)")["twice"].rows
    1
    """
    text = re.sub(r"//.*", "", header).replace("\\\n", " ")
    for name, replacement in re.findall(r"#define (\w+)\s+(.*)", text):
        text = re.sub(rf"\b{name}\b", replacement, text)
    return {name: _signature(arguments) for name, arguments in re.findall(r"\bFUNCTION\((\w+),([^)]*)\)", text)}


def _signature(arguments: str) -> Signature:
    declared = [argument.strip() for argument in arguments.split(",")]
    types = tuple(ctypes.c_void_p if "*" in one else _TYPES[one.split()[0]] for one in declared)
    rows = [index for index, one in enumerate(declared) if one.split()[-1] == "rows"]
    return Signature(types, rows[0] if rows else None)


FUNCTIONS = read_signatures(HEADER.read_text(encoding="utf-8"))
