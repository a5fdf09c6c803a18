"""What a figure is: its question, what it needs, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quasar.results.figures import style
from quasar.results.figures.arms import Arm, Arms


@dataclass(frozen=True)
class Selection:
    """The arms that a figure shows, and a note on how they were chosen."""

    arms: list[Arm]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of an experiment.

    title: the question that it answers
    description: what is drawn, for readers who do not see it
    needs: columns of the rows without which it cannot be drawn
    select: returns the arms that it shows; raises RequestError with the reason if there are none
    draw: draws them into an empty picture
    height: of the axes in inches, without the footer
    width: in inches
    """

    name: str
    title: str
    description: str
    needs: tuple[str, ...]
    select: Callable[[Arms], Selection]
    draw: Callable[[style.Picture, Arms, Selection], None]
    height: Callable[[Selection], float]
    width: float = style.ONE_COLUMN
