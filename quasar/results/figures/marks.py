"""What several figures draw: points with intervals, axes of ratios, rows with names, and names beside points."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from quasar.results.figures import style
from quasar.results.figures.arms import Arm
from quasar.results.intervals import Estimate

Side = Literal["x", "y"]
_MOST_TICKS = 6
_NEAR = 6.0
"""A name that is farther than this from its point, in points, is joined to it by a line."""
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True)
class Name:
    """A text beside a point, in data coordinates."""

    text: str
    x: float
    y: float
    colour: str


def point(
    axes: Axes,
    arm: Arm,
    x: Estimate | float,
    y: Estimate | float,
    *,
    face: str | None = None,
    size: float = 4.0,
) -> None:
    """Draw an arm's marker with the intervals of its coordinates. face: colour of its inside; by default the arm's"""
    colour = arm.look.colour
    at = [value.value if isinstance(value, Estimate) else value for value in (x, y)]
    interval(axes, "x", x, at[1], colour)
    interval(axes, "y", y, at[0], colour)
    fill = arm.look.fill if face is None else "full"
    axes.plot(
        *at,
        marker=arm.look.marker,
        color=colour,
        markersize=size,
        fillstyle=fill,
        markerfacecolor=colour if face is None else face,
        markerfacecoloralt="white",
        markeredgewidth=style.INTERVAL_WIDTH,
        linestyle="none",
        zorder=3,
    )


def interval(axes: Axes, side: Side, value: Estimate | float, at: float, colour: str) -> None:
    """Draw the 95 % interval of a value along an axis, at a place of the other one; nothing if there is none."""
    if isinstance(value, Estimate) and value.low is not None and value.high is not None:
        along, across = [value.low, value.high], [at, at]
        places = (along, across) if side == "x" else (across, along)
        axes.plot(*places, color=colour, linewidth=style.INTERVAL_WIDTH, zorder=2.5, solid_capstyle="butt")


def ratio_axis(axes: Axes, side: Side) -> None:
    """Make an axis of ratios logarithmic, because equal distances are then equal ratios, with a line at 1. Call it when
    everything is drawn.
    """
    (axes.axvline if side == "x" else axes.axhline)(1, color=style.GREY, linewidth=style.THIN, zorder=1)
    low, high = getattr(axes.dataLim, f"interval{side}")
    logarithmic(axes, side, min(low, 1.0), max(high, 1.0), "x")


def logarithmic(axes: Axes, side: Side, low: float, high: float, unit: str = "") -> None:
    """Make an axis logarithmic between two values, with some room and with plain numbers."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    room = max(0.04 * math.log(high / low), 0.015)
    low, high = low * math.exp(-room), high * math.exp(room)
    (axes.set_xscale if side == "x" else axes.set_yscale)("log")
    (axes.set_xlim if side == "x" else axes.set_ylim)(low, high)
    ticks = ratio_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([f"{tick:g}{unit}" for tick in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def ratio_ticks(low: float, high: float) -> list[float]:
    """Return at most six round numbers between two ratios, among them 1 if it lies between them.

    For example 0.8 and 1.7 give 0.8, 1, 1.2, 1.4 and 1.6.
    """
    for step in _STEPS:
        ticks = [round(number * step, 2) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
        ticks = [tick for tick in ticks if tick > 0]
        if low < 1 < high and 1.0 not in ticks:
            ticks = sorted([1.0, *ticks])
        if len(ticks) <= _MOST_TICKS:
            return ticks
    return [1.0]


def named_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows 0, 1, ... of an axis from top to bottom, with a grid along the values."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def subtitle(axes: Axes, *parts: str, width: float = style.ONE_COLUMN) -> None:
    """Write the parts that are not empty above the axes. width: of the figure or panel in inches"""
    words = "; ".join(part for part in parts if part)
    axes.set_title("\n".join(textwrap.wrap(words, style.subtitle_characters(width - 0.6))), loc="left")


def legend(axes: Axes, arms: Sequence[Arm], columns: int) -> None:
    """Name arms above the axes and their subtitle by their markers."""
    handles = [
        Line2D(
            [],
            [],
            color=arm.look.colour,
            marker=arm.look.marker,
            fillstyle=arm.look.fill,  # type: ignore[arg-type]
            markerfacecoloralt="white",
            linestyle="none",
            label=arm.plain_name,
        )
        for arm in arms
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.14), ncols=columns, borderaxespad=0)


def name_points(axes: Axes, names: Sequence[Name]) -> None:
    """Write names beside their points, where they cover no line, point or other name; far ones get a thin line.

    Call it when everything else is drawn, because the places depend on the layout.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    assert isinstance(figure.canvas, FigureCanvasAgg)
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    points = axes.transData.transform(np.array([(name.x, name.y) for name in names], dtype=float).reshape(-1, 2))
    covered = [_along(line) for line in axes.lines if line.get_zorder() > 1]
    taken = np.concatenate([_around(points, 2.5 * scale), *(_around(places, 1.2 * scale) for places in covered)])
    inside = np.array(axes.get_window_extent().extents)
    for name, place in sorted(zip(names, points, strict=False), key=lambda item: tuple(item[1])):
        text = axes.annotate(
            name.text,
            (name.x, name.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=style.LABEL_SIZE,
            color=style.ink(name.colour),
            zorder=4,
        )
        # The axes keep their size, however long a name is.
        text.set_in_layout(False)
        box = text.get_window_extent(figure.canvas.get_renderer())
        choices = np.array(_places(box.width / 2 / scale, box.height / 2 / scale))
        size = np.array(box.size)
        corners = place + choices[:, :2] * scale - size / 2
        moved = np.concatenate([corners, corners + size], axis=1)
        best = int(np.argmin(_costs(moved, taken, inside) + choices[:, 2]))
        dx, dy, distance = choices[best].tolist()
        text.set_position((dx, dy))
        taken = np.concatenate([taken, moved[best : best + 1]])
        if distance > _NEAR:
            leader = _between(place, place + np.array([dx, dy]) * scale)
            taken = np.concatenate([taken, _around(leader, 0.8 * scale)])
            line = axes.annotate(
                "",
                (name.x, name.y),
                (dx, dy - math.copysign(box.height / 2 / scale, dy)),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": name.colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2},
            )
            line.set_in_layout(False)


def height_for_names(count: int) -> float:
    """Return the height in inches of axes with this many points that have names."""
    return 2.9 + 0.08 * max(count - 10, 0)


def name_ends(axes: Axes, names: Sequence[Name]) -> None:
    """Write names at the right of lines' ends, moved up or down where they would cover each other.

    Call it when everything else is drawn. The layout makes room for the names.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    ordered = sorted(names, key=lambda name: name.y)
    places = axes.transData.transform(np.array([(name.x, name.y) for name in ordered]))[:, 1] / scale
    right = max(name.x for name in names)
    for name, place, moved in zip(ordered, places, spread(places.tolist(), 1.25 * style.LABEL_SIZE), strict=True):
        axes.annotate(
            name.text,
            (right, name.y),
            (7, moved - place),
            textcoords="offset points",
            va="center",
            fontsize=style.LABEL_SIZE,
            color=style.ink(name.colour),
            annotation_clip=False,
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places moved as little as possible so that neighbours are at least ``gap`` apart.

    For example 0, 1 and 10 with a gap of 3 give -1, 2 and 10.
    """
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        # Neighbours that would touch become one group around the mean of their places.
        while len(groups) > 1 and _first(groups[-1], gap) - _last(groups[-2], gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_first(group, gap) + number * gap for group in groups for number in range(len(group))]


def _first(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _last(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def _along(line: Line2D) -> np.ndarray:
    """Return points along a line in pixels, [N, 2]."""
    vertices = line.get_transform().transform(line.get_xydata())
    if len(vertices) < 2:
        return np.asarray(vertices)
    return np.concatenate([_between(start, end) for start, end in pairwise(vertices)])


def _between(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return points from one place to another, [9, 2]."""
    return start + np.linspace(0, 1, 9)[:, None] * (end - start)


def _around(places: np.ndarray, half: float) -> np.ndarray:
    """Return squares around places [N, 2] as boxes [N, 4]: left, bottom, right, top."""
    return np.concatenate([places - half, places + half], axis=1)


def _places(width: float, height: float) -> list[tuple[float, float, float]]:
    """Return offsets of a name's centre from its point and their distance, in points.

    width, height: half the name's
    """
    found = []
    for gap in (4.0, 9.0, 15.0, 22.0, 30.0, 40.0):
        for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            if gap > _NEAR and up == 0:
                continue
            found.append((right * (width + (gap if up == 0 else 1.0)), up * (height + gap), gap))
    return found


def _costs(boxes: np.ndarray, taken: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the penalties of a name's places, [K]: pixels that it shares with others, and pixels outside the axes,
    which count more, because the figure may end there.

    boxes, taken, inside: [K, 4], [N, 4] and [4]
    """
    touches, shared = _overlaps(boxes, taken)
    _, within = _overlaps(boxes, inside[None])
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    costs: np.ndarray = (10.0 * touches + shared).sum(axis=1) + 10.0 * (area - within[:, 0])
    return costs


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether boxes [K, 4] touch others [N, 4], and the areas that they share, both [K, N]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    touches = (low <= high).all(axis=-1)
    return touches, np.where(touches, np.prod(high - low, axis=-1), 0.0)
