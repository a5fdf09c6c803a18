"""Figures of timed passes: where verification stops being bound by memory, and from which τ on a draft pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter, StrMethodFormatter

from quasar.errors import RequestError
from quasar.results.figures import style
from quasar.results.figures.marks import logarithmic
from quasar.results.intervals import Estimate
from quasar.results.passes import BEND, PassTimes, pass_times, speculations
from quasar.results.provenance import Provenance

SHOWN_CONTEXT = 512
"""The measured context nearest to this one is shown against the number of rows."""
SHOWN_ROWS = 6
"""The measured number of rows nearest to this one, a draft of 5 tokens, is shown against the context."""
_MARKERS = ("o", "s", "^", "D", "P", "X", "v", "*")
_LABEL_DISTANCE = 0.055
"""Least distance of two labels at the ends of lines, as a share of the axis."""
_TOKENS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Ticks of the axis of tokens per step."""


@dataclass(frozen=True)
class PassFigure:
    """A figure of timed passes.

    title: the question that it answers
    description: what is drawn, for readers who do not see it
    draw: draws the times and the predictions from them into an empty picture
    size: width, and height without the footer, in inches
    """

    name: str
    title: str
    description: str
    draw: Callable[[style.Picture, Sequence[PassTimes], pd.DataFrame], None]
    size: tuple[float, float]


def draw_passes(
    names: Sequence[str], passes: pd.DataFrame, rows: pd.DataFrame, provenance: Provenance, folder: Path
) -> list[Path]:
    """Draw figures into ``folder`` as PDF, SVG and PNG. Returns the files.

    passes: the table of `quasar.results.pass_rows`
    rows: the table of `quasar.results.rows`

    Raises RequestError, naming the reason, if a figure does not exist or cannot be drawn.
    """
    times = pass_times(passes)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for figure in map(named, names):
        footer = provenance.footer(style.footer_characters(figure.size[0]))
        with style.canvas(figure.title, footer, figure.size) as picture:
            figure.draw(picture, times, rows)
            files += style.save(picture, folder / figure.name)
    return files


def named(name: str) -> PassFigure:
    """Return a figure by its name. Raises RequestError if there is none."""
    for figure in PASS_FIGURES:
        if figure.name == name:
            return figure
    names = ", ".join(figure.name for figure in PASS_FIGURES)
    raise RequestError(f"figure {name!r} of timed passes does not exist; choose one of {names}")


def draw_wall(picture: style.Picture, times: Sequence[PassTimes], rows: pd.DataFrame) -> None:
    """Plot t(M) / t(1) against the rows behind one context, and for one number of rows against the context."""
    context = _nearest({found.context for found in times}, SHOWN_CONTEXT)
    shown = _nearest({int(number) for found in times for number in found.rows}, SHOWN_ROWS)
    contexts = sorted({found.context for found in times})
    left, right = picture.subplots(1, 2 if len(contexts) > 1 else 1, sharey=True, squeeze=False)[0][[0, -1]]
    looks = _looks(times)
    ends = []
    for found in times:
        if found.context != context:
            continue
        colour, marker = looks[found.arm]
        values = [found.relative_time(number) for number in found.rows]
        _line(left, list(found.rows), values, colour, marker)
        left.axhline(found.floor().value, color=colour, linewidth=style.THIN, linestyle="--", zorder=1)
        bend = found.bend().value
        if math.isfinite(bend):
            left.plot(bend, BEND, marker="|", markersize=9, color=colour, markeredgewidth=1.2, zorder=4)
        ends.append((found.arm, float(found.rows[-1]), values[-1].value, colour))
    if right is not left:
        for arm, (colour, marker) in looks.items():
            own = [found for found in times if found.arm == arm and shown <= found.rows[-1]]
            values = [found.relative_time(shown) for found in own]
            _line(right, [found.context for found in own], values, colour, marker)
        right.set_xlabel("tokens of context")
        right.set_title(f"a pass with {shown} rows", loc="left")
        _measured_axis(right, contexts)
    left.axhline(BEND, color=style.GREY, linewidth=style.THIN, zorder=1)
    left.set_xlabel("M, rows of the pass: last token + draft")
    left.set_ylabel("time of the pass / own time with 1 row")
    left.set_title(f"behind {context} tokens; dashed: bytes / copy bandwidth; |: {BEND}x", loc="left")
    # The axes share their scale, which has to show the values of both.
    low, high = min(left.dataLim.ymin, right.dataLim.ymin), max(left.dataLim.ymax, right.dataLim.ymax)
    for axes in (left, right):
        axes.axhline(1, color=style.GREY, linewidth=style.THIN, zorder=1)
        logarithmic(axes, "y", min(low, 1.0), max(high, BEND), "x")
    _measured_axis(left, times[0].rows.tolist())
    _label_ends(left, ends)


def draw_break_even(picture: style.Picture, times: Sequence[PassTimes], rows: pd.DataFrame) -> None:
    """Plot the τ that a verifier needs against the rows of a pass, and every arm's τ_ref at its steps' mean cost."""
    axes = picture.subplots()
    looks = _looks(times)
    measured = speculations(times, rows)
    context = measured[0].context if measured else _nearest({found.context for found in times}, SHOWN_CONTEXT)
    ends = []
    for found in times:
        if found.context != context:
            continue
        colour, _ = looks[found.arm]
        values = [found.cost(number) for number in found.rows]
        _line(axes, list(found.rows), values, colour, None)
        ends.append((found.arm, float(found.rows[-1]), values[-1].value, colour))
    for entry in measured:
        colour, marker = looks[entry.group.arm]
        _line(axes, [entry.rows], [entry.tau_ref], colour, marker)
    logarithmic(axes, "y", min(axes.dataLim.ymin, 1.0), max(axes.dataLim.ymax, 1.0))
    axes.yaxis.set_major_locator(FixedLocator(_TOKENS))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.axhline(1, color=style.GREY, linewidth=style.THIN, zorder=1)
    _measured_axis(axes, times[0].rows.tolist())
    axes.set_xlabel("1 + draft tokens per step")
    axes.set_ylabel("tokens per step")
    axes.set_title(f"lines: τ needed behind {context} tokens\nmarks: τ_ref, at the steps' mean cost", loc="left")
    _label_ends(axes, ends)


def _line(axes: Axes, x: Sequence[float], values: Sequence[Estimate], colour: str, marker: str | None) -> None:
    axes.plot(x, [value.value for value in values], color=colour, marker=marker, markersize=3, zorder=3)
    for place, value in zip(x, values, strict=True):
        if value.low is not None and value.high is not None:
            bounds = [value.low, value.high]
            axes.plot([place, place], bounds, color=colour, linewidth=style.INTERVAL_WIDTH, zorder=2.5)


def _looks(times: Sequence[PassTimes]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of every arm: the colour by the verifier's family, darker for fewer bytes."""
    arms = {found.arm: found for found in times}
    looks = {}
    for place, (arm, found) in enumerate(arms.items()):
        family = style.verifier_family(found.verifier)
        alike = [other for other in arms.values() if style.verifier_family(other.verifier) == family]
        order = sorted(alike, key=lambda other: -other.weight_bytes)
        looks[arm] = (style.colours(found.verifier, len(alike))[order.index(found)], _MARKERS[place % len(_MARKERS)])
    return looks


def _nearest(values: set[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(math.log(value / wanted)))


def _measured_axis(axes: Axes, values: Sequence[int]) -> None:
    """Make the x axis logarithmic, with a tick at every measured number that is at least twice the one before."""
    ticks: list[int] = []
    for value in values:
        if not ticks or value >= 2 * ticks[-1]:
            ticks.append(int(value))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write every arm's name at the right of its line, (name, x, y, colour), apart from each other."""
    low, high = (math.log(bound) for bound in axes.get_ylim())
    ordered = sorted(ends, key=lambda end: end[2])
    places: list[float] = []
    for _, _, y, _ in ordered:
        lowest = places[-1] + _LABEL_DISTANCE if places else 0.0
        places.append(max(lowest, (math.log(y) - low) / (high - low)))
    beyond = max(0.0, places[-1] - 1) if places else 0.0
    for place, (name, x, _, colour) in zip(places, ordered, strict=True):
        height = math.exp(low + (place - beyond) * (high - low))
        axes.annotate(
            name,
            (x, height),
            (5, 0),
            textcoords="offset points",
            color=colour,
            fontsize=style.LABEL_SIZE,
            va="center",
            annotation_clip=False,
        )


PASS_FIGURES: tuple[PassFigure, ...] = (
    PassFigure(
        "memory_wall",
        "Where does verification stop being bound by memory?",
        "Time of a verification pass over its own time with one row, against the number of rows and the context",
        draw_wall,
        (style.TWO_COLUMNS, 2.6),
    ),
    PassFigure(
        "break_even_passes",
        "From which τ on does a draft pay?",
        "Tokens per step that a verifier needs for a pass to be worth its cost, and those that were measured",
        draw_break_even,
        (style.ONE_COLUMN, 2.6),
    ),
)
"""Every figure of timed passes, by its name in ``publish.pass_figures``."""
