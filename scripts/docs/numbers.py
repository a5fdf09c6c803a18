"""Copies single numbers of committed results into a page.

    The KL of INT8 is {{ pruning_vs_quantization | int8 | KL }} nats per token.

names an experiment, an arm and the heading of a column in its table.md. The interval in brackets is left out.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from quasar.errors import RequestError

_PLACE = re.compile(r"\{\{ (?P<experiment>\w+) \| (?P<arm>[^|\n]+) \| (?P<heading>[^|\n]+) \}\}")


def with_numbers(text: str, root: Path) -> str:
    """Return a page's text with its numbers. Raises RequestError if a table has no such arm or column."""

    def number(match: re.Match[str]) -> str:
        file = root / "experiments" / match["experiment"] / "table.md"
        cells = _cells(file)
        try:
            return cells[match["arm"], match["heading"]].partition(" (")[0]
        except KeyError:
            raise RequestError(f"{match[0]}: {file} has no such arm or column") from None

    return _PLACE.sub(number, text)


@lru_cache(maxsize=8)
def _cells(file: Path) -> dict[tuple[str, str], str]:
    """Return the cells of all tables of a table.md, by arm and heading; of equal headings the first."""
    found: dict[tuple[str, str], str] = {}
    headings: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            headings = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not headings:
            headings = cells
        elif not cells[0].startswith("---"):
            for heading, cell in zip(headings[1:], cells[1:], strict=True):
                found.setdefault((cells[0], heading), cell)
    return found
