"""Console output: header, progress bars and tables. If the output is not a terminal, it consists of plain lines."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table, box
from rich.text import Text

from quasar.errors import QuasarError
from quasar.results.layout import Column, fit

PLAIN_WIDTH = 80
"""Characters of a line if the output is not a terminal and the variable COLUMNS is not set."""
SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int, int], None]


class Reporter:
    """Writes to standard output: progress bars and boxes on a terminal, else lines without control characters."""

    def __init__(self) -> None:
        console = _Console(highlight=False)
        self.interactive = console.is_terminal
        self.console = console if self.interactive else _Console(highlight=False, width=_plain_width())

    @property
    def width(self) -> int:
        """Characters of a line."""
        return self.console.width

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print one line as it is, however long: a path, or something that programs read."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def paragraph(self, text: str, label: str = "", style: str | None = None) -> None:
        """Print sentences, wrapped at spaces. The lines after the first one are indented by the label's width."""
        wrapper = textwrap.TextWrapper(
            self.width,
            initial_indent=label,
            subsequent_indent=" " * len(label),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in wrapper.wrap(text) or [label.rstrip()]:
            self.line(line, style)

    def header(self, entries: Mapping[str, str]) -> None:
        width = max(map(len, entries))
        for key, value in entries.items():
            self.paragraph(value, label=f"{key:<{width}}  ")

    def warning(self, text: str) -> None:
        self.paragraph(text, label="warning: ", style="yellow")

    @contextmanager
    def progress(self, what: str) -> Iterator[Advance]:
        """Show a progress bar for one task. The body calls the yielded function with (done, total)."""
        with self.live(what) as update:
            yield lambda done, total: update(done, total, "")

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, int, int], None]]:
        """Show progress bars for consecutive tasks. The body calls the yielded function with (what, done, total)."""
        with ExitStack() as stack:
            bars: dict[str, Advance] = {}

            def advance(what: str, done: int, total: int) -> None:
                if what not in bars:
                    if not self.interactive:
                        self.line(what)
                    stack.close()
                    bars[what] = stack.enter_context(self.progress(what))
                bars[what](done, total)

            yield advance

    @contextmanager
    def live(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        """Same as `progress`, but the body calls the yielded function with (done, total, note)."""
        if self.interactive:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as bars:
                task = bars.add_task(what, total=None, note="")
                yield lambda done, total, note: bars.update(task, completed=done, total=total, note=note)
            return
        last = time.monotonic()

        def update(done: int, total: int, note: str) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.line(f"{what} {done}/{total} {note}".rstrip())

        yield update

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)
    ) -> None:
        """Print a table with all its columns. text: as for `build_table`."""
        self.console.print(self.build_table(title, columns, rows, text))

    def fitted_table(self, title: str, columns: Sequence[Column], rest: str) -> None:
        """Print the columns that fit the width, and name those that do not in a sentence below the table.

        rest: where the reader finds the other columns, such as "summary.json has them"
        """
        fitted = fit(columns, self.width)
        shown = fitted.shown
        rows = list(zip(*(column.cells for column in shown), strict=True))
        text = [index for index, column in enumerate(shown) if column.is_text]
        self.table(title, [column.heading for column in shown], rows, text)
        if fitted.dropped:
            names = ", ".join(column.heading for column in fitted.dropped)
            self.paragraph(f"Not shown in {self.width} characters: {names}; {rest}.")

    def build_table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)
    ) -> Table:
        """Build a table.

        text: indices of the columns with text, which is wrapped; the others are numbers, aligned to the right
        """
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if self.interactive else box.ASCII2)
        for index, column in enumerate(columns):
            if index in text:
                table.add_column(column, justify="left", overflow="fold")
            else:
                table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


class OutputClosedError(QuasarError):
    """The reader of standard output has closed it, as ``head`` does in ``quasar list | head``."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Fail as a run does. Rich would exit the program, and the run's status would stay "running"."""
        raise OutputClosedError("standard output was closed; the same command continues the run") from None


def _plain_width() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else PLAIN_WIDTH
