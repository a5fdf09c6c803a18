"""Chooses the columns of a table that fit a number of characters, so that no number is broken across lines.

A column of numbers is shown in full or dropped. The columns of the highest ranks are dropped first, so that a table
always has the columns of the first few ranks. For example:

>>> columns = [Column("task", ("chat",), is_text=True), Column("speed", ("1.93x",), rank=2), Column("τ", ("2.1",), 1)]
>>> fit(columns, 24).shown == columns
True
>>> [column.heading for column in fit(columns, 20).dropped]
['speed']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

TEXT_WIDTH = 24
"""Most characters of a column of text; longer texts continue in the next line."""
_EDGE, _BETWEEN = 1, 3
"""Characters of a table's frame beside its cells: once, and for each column."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    rank: place in the order in which columns are kept; 1 and None are always kept
    is_text: whether it is aligned to the left and may be wrapped; the others are numbers
    """

    heading: str
    cells: tuple[str, ...]
    rank: int | None = None
    is_text: bool = False

    @property
    def width(self) -> int:
        widest = max(cell_len(text) for text in (self.heading, *self.cells))
        return min(widest, TEXT_WIDTH) if self.is_text else widest


@dataclass(frozen=True)
class Fitted:
    """The columns of a table that are shown and those that are not, both in the table's order."""

    shown: list[Column]
    dropped: list[Column]


def fit(columns: Sequence[Column], width: int) -> Fitted:
    """Drop the column of the highest rank until the table has at most ``width`` characters.

    The column of rank 1 is never dropped. Equal ranks are dropped from the right.
    """
    droppable = [(column.rank, index) for index, column in enumerate(columns) if column.rank not in (None, 1)]
    dropped: set[int] = set()
    for _, index in sorted(droppable, reverse=True):
        if table_width(_without(columns, dropped)) <= width:
            break
        dropped.add(index)
    return Fitted(_without(columns, dropped), [columns[index] for index in sorted(dropped)])


def table_width(columns: Sequence[Column]) -> int:
    """Return the characters of a line of a table, its frame included."""
    return _EDGE + sum(column.width + _BETWEEN for column in columns)


def _without(columns: Sequence[Column], dropped: set[int]) -> list[Column]:
    return [column for index, column in enumerate(columns) if index not in dropped]
