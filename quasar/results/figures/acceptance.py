"""The figure of acceptance by position."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator

from quasar.errors import RequestError
from quasar.results.figures import style
from quasar.results.figures.arms import Arm, Arms, in_common_setting, largest, notes
from quasar.results.figures.figure import Figure, Selection
from quasar.results.figures.marks import Name, name_ends, point, subtitle
from quasar.results.intervals import Estimate
from quasar.results.quantities import conditional_acceptance

_FEWEST_DRAFTS = 30
"""A position that fewer drafts reach is not drawn."""
_MOST_LINES = 8


def _select_positions(arms: Arms) -> Selection:
    found = [arm for arm in arms.all if _positions(arms, arm)]
    if not found:
        raise RequestError(f"no arm has a position that at least {_FEWEST_DRAFTS} drafts reach")
    common, setting = in_common_setting(found)
    kept, left_out = largest(
        common, _MOST_LINES, lambda arm: _positions(arms, arm)[0].value, "highest at the first position"
    )
    return Selection(kept, notes(setting, left_out))


def draw_positions(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A line per arm: the share of the drafts that reach a position whose token there is accepted."""
    axes = picture.subplots()
    names = []
    last = 1
    for arm in selection.arms:
        values = _positions(arms, arm)
        places = range(1, len(values) + 1)
        axes.plot(places, [found.value for found in values], color=arm.look.colour, linestyle=arm.look.line)
        for place, found in zip(places, values, strict=True):
            point(axes, arm, place, found)
        names.append(Name(arm.name, places[-1], values[-1].value, arm.look.colour))
        last = max(last, places[-1])
    axes.set_ylim(0, 1)
    axes.set_xlim(0.8, last + 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted, of the drafts that reach it")
    subtitle(axes, selection.note)
    name_ends(axes, names)


def _positions(arms: Arms, arm: Arm) -> list[Estimate]:
    """Return the conditional acceptance of the positions, from 1, that enough drafts reach."""
    found = []
    deepest = max(len(counts) for counts in arm.rows["reached_by_position"])
    for position in range(1, deepest + 1):
        reached = sum(
            int(counts[position - 1]) for counts in arm.rows["reached_by_position"] if position <= len(counts)
        )
        estimate = arms.estimate(arm, conditional_acceptance(position)) if reached >= _FEWEST_DRAFTS else None
        if estimate is None:
            break
        found.append(estimate)
    return found


ACCEPTANCE = (
    Figure(
        "positions",
        "How far do drafts hold?",
        "Share of the drafts that reach a position whose token there is accepted, by position, a line per arm.",
        ("reached_by_position", "accepted_by_position"),
        _select_positions,
        draw_positions,
        lambda selection: 2.5,
    ),
)
