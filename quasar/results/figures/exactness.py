"""The matrix of exactness: whether speculation changes the text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.patches import Rectangle

from quasar.results.figures import style
from quasar.results.figures.arms import NO_DRAFTER, Arm, Arms
from quasar.results.figures.figure import Figure, Selection
from quasar.results.figures.marks import subtitle

_EQUAL, _DIFFERENT = 0.25, -1.0
"""Where the colours of cells lie between the ends of the diverging scale."""


def _select_exactness(arms: Arms) -> Selection:
    return Selection(arms.measured("exact_match_to_self", of=lambda arm: arm.drafter != NO_DRAFTER))


def draw_exactness(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A cell per arm and drafter: how many outputs equal those of autoregressive decoding, and where others part."""
    axes = picture.subplots()
    names, drafters = _names(selection.arms), _drafters(selection.arms)
    for row, name in enumerate(names):
        for column, drafter in enumerate(drafters):
            own = [arm.rows for arm in selection.arms if (_name(arm), arm.drafter) == (name, drafter)]
            if own:
                equal, compared, place = equality(pd.concat(own))
                colour = style.diverging(_EQUAL if equal == compared else _DIFFERENT)
                axes.add_patch(Rectangle((column - 0.48, row - 0.45), 0.96, 0.9, facecolor=colour, edgecolor="none"))
                text = f"{equal} of {compared}" + ("" if place is None else f"\nfrom {place}")
                axes.text(column, row, text, ha="center", va="center", fontsize=style.LABEL_SIZE)
    axes.set_xlim(-0.5, len(drafters) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(drafters)), [drafter.replace("_", "\n") for drafter in drafters])
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    rows = pd.concat([arm.rows for arm in selection.arms])
    equal, compared, _ = equality(rows)
    total = f"{equal} of {compared} outputs, {int(rows['tokens'].sum())} tokens in all"
    subtitle(axes, "outputs equal to AR-same's", total, width=0.75 * style.TWO_COLUMNS)


def equality(rows: pd.DataFrame) -> tuple[int, int, int | None]:
    """Return how many outputs equal AR-same's, how many were compared, and the first token at which one differs."""
    places = rows["first_divergence"].dropna()
    return int(rows["match_self"].sum()), int(rows["compared"].sum()), None if places.empty else int(places.min())


def _name(arm: Arm) -> str:
    return str(arm.rows["arm"].iloc[0])


def _names(arms: Sequence[Arm]) -> list[str]:
    return list(dict.fromkeys(map(_name, arms)))


def _drafters(arms: Sequence[Arm]) -> list[str]:
    return list(dict.fromkeys(arm.drafter for arm in arms))


EXACTNESS = Figure(
    "exactness",
    "Does speculation change the text?",
    "Outputs of every arm and drafter that equal autoregressive decoding with the same verifier.",
    ("compared", "match_self"),
    _select_exactness,
    draw_exactness,
    lambda selection: 1.0 + 0.26 * len(_names(selection.arms)),
    style.TWO_COLUMNS,
)
