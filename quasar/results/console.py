"""Console output: header, progress bars and tables. If the output is not a terminal, it consists of plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table, box
from rich.text import Text

from quasar.errors import QuasarError

PLAIN_WIDTH = 160
SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int, int], None]


class Reporter:
    """Writes to standard output: progress bars and boxes on a terminal, else lines without control characters."""

    def __init__(self) -> None:
        console = _Console(highlight=False)
        self.interactive = console.is_terminal
        self.console = console if self.interactive else _Console(highlight=False, width=PLAIN_WIDTH)

    def line(self, text: str = "", style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def header(self, entries: Mapping[str, str]) -> None:
        width = max(map(len, entries))
        for key, value in entries.items():
            self.line(f"{key:<{width}}  {value}")

    def warning(self, text: str) -> None:
        self.line(f"warning: {text}", style="yellow")

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

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose first column is text and whose other columns are numbers."""
        self.console.print(self.build_table(title, columns, rows))

    def build_table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)
    ) -> Table:
        """Build a table. text: indices of the columns with text; the others are numbers, aligned to the right."""
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if self.interactive else box.ASCII2)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index in text else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Fail as a run does. Rich would exit the program, and the run's status would stay "running"."""
        raise QuasarError("standard output was closed; the same command continues the run") from None
