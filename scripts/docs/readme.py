"""Refreshes the generated parts of README.md: ``python -m scripts.docs.readme``; ``make docs`` does it too.

A part stands between two comments, ``<!-- generated: NAME -->`` and ``<!-- end -->``, where NAME is in `PARTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from scripts.docs import pairs
from scripts.docs.record import recorded_text

ROOT = Path(__file__).parents[2]
PARTS: dict[str, Callable[[], str]] = {
    "pairs": lambda: f"{pairs.matrix()}\n\n{pairs.LEGEND}",
    "first run": lambda: f"```text\n{recorded_text('first_run')}```",
}
_PLACE = re.compile(r"(<!-- generated: (?P<name>[^\n]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """Return a text with current parts. Raises KeyError for a part that is not in `PARTS`."""
    return _PLACE.sub(lambda match: f"{match[1]}{PARTS[match['name']]()}\n{match[4]}", text)


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(refreshed(file.read_text(encoding="utf-8")), encoding="utf-8")
