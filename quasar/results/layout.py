"""Chooses the columns of a table that fit a number of characters, so that no number is broken across lines.

A column of numbers is shown in full or dropped. A column with rank 1 is dropped last, so that a table of a given width
always has the columns of a first few ranks. For example, three columns of 9 characters fit 40, four do not:

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

    rank: place in the order in which columns are kept, 1 is kept longest; None for a column that is always kept
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

    The last column of numbers is never dropped. Equal ranks are dropped from the right.
    """
    shown = list(columns)
    while table_width(shown) > width:
        ranked = [column for column in shown if column.rank is not None]
        if not ranked or sum(not column.is_text for column in shown) == 1:
            break
        last = max(reversed(ranked), key=lambda column: column.rank or 0)
        shown = [column for column in shown if column is not last]
    return Fitted(shown, [column for column in columns if all(column is not other for other in shown)])


def table_width(columns: Sequence[Column]) -> int:
    """Return the characters of a line of a table, its frame included."""
    return _EDGE + sum(column.width + _BETWEEN for column in columns)
