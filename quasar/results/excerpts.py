"""Tables in README files that are copies of committed results, refreshed by ``make figures``.

A README marks the place with two comments, between which the table of a section is copied:

    <!-- table: experiments/main_table/table.md, By task family: τ_ref -->
    <!-- end -->
"""

from __future__ import annotations

import re
from pathlib import Path

from quasar.errors import RequestError

_PLACE = re.compile(r"(<!-- table: (?P<file>[^,\n]+), (?P<section>[^\n]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def refreshed(text: str, root: Path) -> str:
    """Return a README's text with current tables. Files are relative to ``root``.

    Raises RequestError if a file or a section does not exist.
    """

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{section_table(root / match['file'], match['section'])}\n\n{match[5]}"

    return _PLACE.sub(table, text)


def section_table(file: Path, section: str) -> str:
    """Return the table of a section of table.md. Raises RequestError if there is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({error}); run make reproduce first") from None
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title.strip() == section:
            return "\n".join(line for line in body.splitlines() if line.startswith("|"))
    raise RequestError(f"{file}: has no section {section!r}")
