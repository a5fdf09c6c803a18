"""Refreshes the generated parts of README files and pages: ``python -m scripts.docs.parts``; ``make docs`` does it too.

They are in the sources, so that these can be read without building the site. A part stands between two comments:

    <!-- generated: NAME -->
    <!-- end -->

NAME is in `PARTS`, or it is "file PATH", for the content of a file of the repository.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from scripts.docs import experiments, pairs
from scripts.docs.record import recorded_text

ROOT = Path(__file__).parents[2]
PARTS: dict[str, Callable[[], str]] = {
    "pairs": pairs.explained_matrix,
    "experiments": experiments.table,
    "first run": lambda: f"```text\n{recorded_text('first_run')}```",
}
_PLACE = re.compile(r"(<!-- generated: (?P<name>[^\n]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml"}


def pages() -> list[Path]:
    """Return the files that may have generated parts."""
    return [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def refreshed(text: str) -> str:
    """Return a text with current parts. Raises KeyError for a part that does not exist."""
    return _PLACE.sub(lambda match: f"{match[1]}\n{_part(match['name'])}\n\n{match[4]}", text)


def _part(name: str) -> str:
    if not name.startswith("file "):
        return PARTS[name]()
    path = Path(name.removeprefix("file "))
    content = (ROOT / path).read_text(encoding="utf-8")
    return f'```{_LANGUAGES[path.suffix]} title="{path}"\n{content}```'


if __name__ == "__main__":
    for page in pages():
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
