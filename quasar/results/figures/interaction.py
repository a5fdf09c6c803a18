"""The two matrices of drafters and verifiers, and the test of their interaction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from quasar.errors import RequestError
from quasar.results.figures import style
from quasar.results.figures.arms import NO_DRAFTER, Arm, Arms, in_common_setting, notes
from quasar.results.figures.figure import Figure, Selection
from quasar.results.figures.marks import subtitle
from quasar.results.figures.speed import SPEEDUP
from quasar.results.intervals import Estimate, Sums, estimate, holm
from quasar.results.quantities import QUANTITIES

Value = TypeVar("Value")
TAU_REF = "mean_acceptance_length_ref"
SIGNIFICANT = 0.05
_PANELS = {SPEEDUP: "speedup on the reference's text", TAU_REF: "τ_ref, tokens per step"}
_SMALLEST_SCALE = 0.05
"""The colours end at this deviation if all are smaller, so that noise does not look like an effect."""


@dataclass(frozen=True)
class Cell:
    """A drafter with a verifier.

    deviation: the value over what the drafter's row and the verifier's column predict together; 1 if they do not
        interact
    significant: whether it differs from 1 at the level of 5 % after the adjustment for testing all cells
    """

    arm: Arm
    value: Estimate
    deviation: Estimate
    significant: bool


def interactions(arms: Arms, chosen: Sequence[Arm], quantity: str) -> list[Cell]:
    """Compare every arm's value with the model ``drafter × verifier``, which is fitted to all of them by least squares
    of logarithms. Prompts are drawn for all arms together, because they all decode the same ones.
    """
    numerator, denominator = _totals(quantity)
    keys = ["family", "question", "repetition"]
    joined = None
    for number, arm in enumerate(chosen):
        its = arm.rows[[*keys, numerator, denominator]].dropna()
        its = its.rename(columns={numerator: f"numerator {number}", denominator: f"denominator {number}"})
        joined = its if joined is None else joined.merge(its, on=keys)
    assert joined is not None
    wide = joined.pivot(index=["family", "question"], columns="repetition").astype(float).dropna()
    families = list(wide.index.get_level_values("family"))
    columns = {str(name): wide[name].to_numpy() for name in wide.columns.get_level_values(0).unique()}
    residual = _residual_of_main_effects(chosen)

    found = []
    for weights_of_arms in residual:

        def deviation(sums: Sums, weights: np.ndarray = weights_of_arms) -> np.ndarray:
            logs = [
                np.log(sums[f"numerator {other}"].sum(-1)) - np.log(sums[f"denominator {other}"].sum(-1))
                for other in range(len(chosen))
            ]
            result: np.ndarray = np.exp(sum(weight * log for weight, log in zip(weights, logs, strict=True)))
            return result

        found.append(estimate(columns, families, deviation))
    tests = holm([_p_value(entry) for entry in found])
    return [
        Cell(arm, arms.value(arm, quantity), entry, adjusted < SIGNIFICANT)
        for arm, entry, adjusted in zip(chosen, found, tests, strict=True)
    ]


def _select_matrices(arms: Arms) -> Selection:
    found, setting = in_common_setting(arms.measured(SPEEDUP, TAU_REF))
    cells: dict[tuple[str, tuple[str, int]], Arm] = {}
    for arm in sorted(found, key=lambda arm: -arms.value(arm, SPEEDUP).value):
        cells.setdefault((arm.drafter, _verifier(arm)), arm)
    drafters = _distinct(arm.drafter for arm in found)
    verifiers = _distinct(_verifier(arm) for arm in found)
    # Only verifiers and drafters with at least two cells tell an interaction from a main effect.
    kept = [
        cells[drafter, verifier]
        for drafter, verifier in cells
        if sum((drafter, other) in cells for other in verifiers) > 1
        and sum((other, verifier) in cells for other in drafters) > 1
    ]
    speculative = {arm.drafter for arm in kept} - {NO_DRAFTER}
    if len(speculative) < 2 or len({_verifier(arm) for arm in kept}) < 2:
        raise RequestError("it needs at least two drafters, each with the same two or more verifiers")
    order = [arm for arm in found if arm in kept]
    note = "the fastest arm of each pair" if len(cells) < len(found) else ""
    return Selection(order, notes(setting, note))


def draw_matrices(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """Two matrices of drafters and verifiers: cells with values, coloured by the deviation from drafter × verifier."""
    panels = picture.subplots(1, len(_PANELS), sharey=True)
    verifiers = _distinct(_verifier(arm) for arm in selection.arms)
    drafters = _distinct(arm.drafter for arm in selection.arms)
    for axes, (quantity, heading) in zip(panels, _PANELS.items(), strict=True):
        shown = [arm for arm in selection.arms if quantity == SPEEDUP or arm.drafter != NO_DRAFTER]
        cells = interactions(arms, shown, quantity)
        scale = max(_SMALLEST_SCALE, *(abs(math.log(cell.deviation.value)) for cell in cells))
        for cell in cells:
            _draw_cell(
                axes, cell, quantity, scale, verifiers.index(_verifier(cell.arm)), drafters.index(cell.arm.drafter)
            )
        axes.set_xlim(-0.5, len(verifiers) - 0.5)
        axes.set_ylim(len(drafters) - 0.5, -0.5)
        axes.set_xticks(range(len(verifiers)), _verifier_names(verifiers))
        axes.set_yticks(range(len(drafters)), drafters)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        key = f"full colour: {math.exp(scale) - 1:+.0%} or {math.exp(-scale) - 1:+.0%}"
        subtitle(axes, heading, key, selection.note, width=style.TWO_COLUMNS / 2)
    picture.supylabel("drafter", fontsize=7.5)
    panels[0].set_xlabel("blue: more, orange: less than drafter × verifier")
    panels[1].set_xlabel("framed: interaction, Holm-adjusted p < 0.05")


def _draw_cell(axes: Axes, cell: Cell, quantity: str, scale: float, column: int, row: int) -> None:
    colour = style.diverging(math.log(cell.deviation.value) / scale)
    axes.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=colour, edgecolor="none"))
    if cell.significant:
        frame = Rectangle((column - 0.45, row - 0.43), 0.9, 0.86, facecolor="none", edgecolor="black", linewidth=1.2)
        axes.add_patch(frame)
    form = QUANTITIES[quantity].form
    axes.text(column, row - 0.14, form(cell.value.value), ha="center", va="center", fontsize=7)
    if cell.value.low is not None and cell.value.high is not None:
        bounds = f"{cell.value.low:.2f} to {cell.value.high:.2f}"
        axes.text(column, row + 0.2, bounds, ha="center", va="center", fontsize=style.FOOTER_SIZE)


def _residual_of_main_effects(chosen: Sequence[Arm]) -> np.ndarray:
    """Return the matrix [N, N] that maps the arms' logarithms to what rows and columns do not explain."""
    design = pd.get_dummies(
        pd.DataFrame({"drafter": [arm.drafter for arm in chosen], "verifier": [str(_verifier(arm)) for arm in chosen]})
    ).to_numpy(dtype=float)
    result: np.ndarray = np.eye(len(chosen)) - design @ np.linalg.pinv(design)
    return result


def _p_value(found: Estimate) -> float:
    """Return the two-sided p-value of the bootstrap for a ratio of 1; 1 if no resample differs."""
    return 1.0 if found.low is None or found.p_of_one is None else found.p_of_one


def _totals(quantity: str) -> tuple[str, str]:
    return ("text_ar_ref_ms", "text_ms") if quantity == SPEEDUP else ("text_tokens", "text_steps")


def _verifier(arm: Arm) -> tuple[str, int]:
    return arm.verifier, arm.weight_bytes


def _verifier_names(verifiers: Sequence[tuple[str, int]]) -> list[str]:
    """Return a name per verifier, with its size if several have the same name."""
    names = [name for name, _ in verifiers]
    return [f"{name}\n{size / 1e6:.0f} MB" if names.count(name) > 1 else name for name, size in verifiers]


def _distinct(values: Iterable[Value]) -> list[Value]:
    return list(dict.fromkeys(values))


MATRICES = Figure(
    "matrices",
    "Do drafter and verifier interact?",
    "Two matrices of drafters and verifiers with the speedup and with τ_ref, coloured by the deviation from the "
    "product of the drafter's and the verifier's effects.",
    ("text_ms", "text_ar_ref_ms", "text_tokens", "text_steps"),
    _select_matrices,
    draw_matrices,
    lambda selection: 0.95 + 0.36 * len({arm.drafter for arm in selection.arms}),
    style.TWO_COLUMNS,
)
