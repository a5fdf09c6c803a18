"""The figures of an experiment, drawn from its rows and its provenance: `FIGURES`, `draw` and `picture`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from quasar.errors import RequestError
from quasar.results.figures import style
from quasar.results.figures.acceptance import ACCEPTANCE
from quasar.results.figures.arms import Arms
from quasar.results.figures.exactness import EXACTNESS
from quasar.results.figures.fidelity import FIDELITY
from quasar.results.figures.figure import Figure
from quasar.results.figures.interaction import MATRICES
from quasar.results.figures.speed import SPEED
from quasar.results.provenance import Provenance

FIGURES: tuple[Figure, ...] = (*SPEED, *FIDELITY, EXACTNESS, *ACCEPTANCE, MATRICES)
"""Every figure, in the order in which they are drawn."""


def draw(
    names: Sequence[str], rows: pd.DataFrame, provenance: Provenance, folder: Path, complete: bool = True
) -> list[Path]:
    """Draw figures into ``folder`` as PDF, SVG and PNG. Returns the files.

    rows: the table of `quasar.results.rows`
    complete: whether every figure must be drawn; if not, those that the rows do not allow are left out

    Raises RequestError, naming the reason, if a figure does not exist, or if one that must be drawn cannot be.
    """
    files, reasons = _draw([named(name) for name in names], rows, provenance, folder)
    if complete and reasons:
        raise RequestError("; ".join(reasons))
    return files


def draw_all(rows: pd.DataFrame, provenance: Provenance, folder: Path) -> list[Path]:
    """Draw every figure that the rows allow, like `draw`. Raises RequestError with the reasons if there is none."""
    files, reasons = _draw(FIGURES, rows, provenance, folder)
    if not files:
        raise RequestError(f"no figure can be drawn: {'; '.join(reasons)}")
    return files


def picture(name: str, rows: pd.DataFrame, provenance: Provenance) -> style.Picture:
    """Return a figure for a notebook, which shows it. Raises RequestError, naming the reason, if it cannot be drawn."""
    with _drawn(named(name), Arms(rows), provenance) as drawn:
        return drawn


def named(name: str) -> Figure:
    """Return a figure by its name. Raises RequestError if there is none."""
    for figure in FIGURES:
        if figure.name == name:
            return figure
    raise RequestError(f"figure {name!r} does not exist; choose one of {', '.join(figure.name for figure in FIGURES)}")


def _draw(
    figures: Sequence[Figure], rows: pd.DataFrame, provenance: Provenance, folder: Path
) -> tuple[list[Path], list[str]]:
    """Draw the figures that the rows allow. Returns the files, and for every other figure the reason."""
    arms = Arms(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    reasons: list[str] = []
    for figure in figures:
        try:
            with _drawn(figure, arms, provenance) as picture:
                files += style.save(picture, folder / figure.name)
        except RequestError as error:
            reasons.append(str(error))
    return files, reasons


@contextmanager
def _drawn(figure: Figure, arms: Arms, provenance: Provenance) -> Iterator[style.Picture]:
    missing = [column for column in figure.needs if column not in arms.rows or arms.rows[column].isna().all()]
    if missing:
        raise RequestError(f"{figure.name}: no row has {', '.join(missing)}")
    try:
        selection = figure.select(arms)
    except RequestError as error:
        raise RequestError(f"{figure.name}: {error}") from None
    footer = provenance.footer(style.footer_characters(figure.width))
    with style.canvas(figure.title, footer, (figure.width, figure.height(selection))) as drawn:
        figure.draw(drawn, arms, selection)
        yield drawn
