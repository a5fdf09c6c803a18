"""Tables and numbers in README files that are copies of committed results, refreshed by ``make figures``.

A README marks the place with two comments. Between them the table of a section is copied,

    <!-- table: experiments/main_table/table.md, By task family: τ_ref -->
    <!-- end -->

or one cell, named by its experiment, its arm and the heading of its column:

    <!-- cell: main_table; int8 (paper); τ_ref --><!-- end -->

An arm that has several rows is followed by the second column's heading and value:

    <!-- cell: draft_length; int8, draft tokens 3; τ_ref --><!-- end -->
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from quasar.errors import RequestError

_TABLE = re.compile(r"(<!-- table: (?P<file>[^,\n]+), (?P<section>[^\n]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_CELL = re.compile(
    r"(<!-- cell: (?P<experiment>\w+); (?P<arm>[^;\n]+); (?P<heading>[^;\n]+?) -->)[^\n]*?(<!-- end -->)"
)


def refreshed(text: str, root: Path) -> str:
    """Return a README's text with current tables and cells. Files are relative to ``root``.

    Raises RequestError if a file, a section, an arm or a column does not exist.
    """

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{section_table(root / match['file'], match['section'])}\n\n{match[5]}"

    def cell(match: re.Match[str]) -> str:
        return f"{match[1]}{table_cell(root, match['experiment'], match['arm'], match['heading'])}{match[5]}"

    return _CELL.sub(cell, _TABLE.sub(table, text))


def section_table(file: Path, section: str) -> str:
    """Return the table of a section of table.md. Raises RequestError if there is none."""
    for part in _read(file).split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title.strip() == section:
            return "\n".join(line for line in body.splitlines() if line.startswith("|"))
    raise RequestError(f"{file}: has no section {section!r}")


def table_cell(root: Path, experiment: str, arm: str, heading: str) -> str:
    """Return a cell of an experiment's table.md, such as "1.36x (1.25x to 1.48x)".

    Raises RequestError if no table has the arm and the column.
    """
    file = root / "experiments" / experiment / "table.md"
    try:
        return _cells(_read(file))[arm, heading]
    except KeyError:
        raise RequestError(f"{file}: has no arm {arm!r} with a column {heading!r}") from None


@lru_cache(maxsize=8)
def _cells(text: str) -> dict[tuple[str, str], str]:
    """Return the cells of all tables of a table.md, by arm and heading, and by arm with its second column and heading.

    Of equal keys the first counts.
    """
    found: dict[tuple[str, str], str] = {}
    headings: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            headings = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not headings:
            headings = cells
        elif not cells[0].startswith("---"):
            for arm in (cells[0], f"{cells[0]}, {headings[1]} {cells[1]}"):
                for heading, cell in zip(headings[1:], cells[1:], strict=True):
                    found.setdefault((arm, heading), cell)
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({error}); run make reproduce first") from None
