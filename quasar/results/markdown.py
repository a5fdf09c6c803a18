"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]], text: int = 1) -> str:
    """Return a Markdown table whose first ``text`` columns are aligned to the left and the others to the right."""
    aligned = ["---"] * text + ["---:"] * (len(headings) - text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, aligned, *lines])
