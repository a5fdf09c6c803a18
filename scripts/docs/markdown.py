"""Markdown tables of text."""

from __future__ import annotations


def escaped(text: str) -> str:
    """Return a text for a cell of a table."""
    return text.replace("|", "\\|")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table_head(*headings: str) -> str:
    return f"{row(*headings)}\n{row(*['---'] * len(headings))}"
