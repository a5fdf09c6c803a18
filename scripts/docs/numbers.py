"""Copies single numbers of committed results into a page.

    The KL of INT8 is {{ pruning_vs_quantization | int8 | KL }} nats per token.

names an experiment, an arm and the heading of a column in its table.md. The interval in brackets is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from quasar.results.excerpts import table_cell

_PLACE = re.compile(r"\{\{ (?P<experiment>\w+) \| (?P<arm>[^|\n]+) \| (?P<heading>[^|\n]+) \}\}")


def with_numbers(text: str, root: Path) -> str:
    """Return a page's text with its numbers. Raises RequestError if a table has no such arm or column."""

    def number(match: re.Match[str]) -> str:
        return table_cell(root, match["experiment"], match["arm"], match["heading"]).partition(" (")[0]

    return _PLACE.sub(number, text)
