"""Figures of speed: how fast, on which tasks, where it comes from, and what it takes."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from quasar.errors import RequestError
from quasar.results.estimates import UNQUANTIZED
from quasar.results.figures import style
from quasar.results.figures.arms import NO_DRAFTER, Arm, Arms, Look, in_common_setting, largest, notes
from quasar.results.figures.figure import Figure, Selection
from quasar.results.figures.marks import (
    Name,
    height_for_names,
    interval,
    legend,
    logarithmic,
    name_ends,
    name_points,
    named_rows,
    point,
    ratio_axis,
    subtitle,
)
from quasar.results.intervals import Estimate
from quasar.results.quantities import QUANTITIES

SPEEDUP = "reference_text_speedup"
SPEEDUP_AXIS = "speedup over AR-ref on the same text"
_TEXT_COLUMNS = ("text_ms", "text_ar_ref_ms")
_MOST_GROUPS = 6
_MOST_BY_TASK = 8
_RATIO_LINES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
_LINE_WIDTHS = (0.4, 1.0)
"""Widths of the lines of equal speedup, and of the line of break-even."""
_FREE = {"speedup_vs_ar_ref": "white", "speedup_vs_ar_same": style.LIGHT_GREY}
"""Free-running speedups with the inside of their markers."""
_GAINS = ("quantization_alone", "speculation_alone", "interaction", SPEEDUP)
_PAPER = {"speculation alone": (1.0, 1.18), "quantized verifier": (1.18, 1.28), "both": (1.0, 1.28)}
"""The gain that the paper reports for Qwen3-8B at T = 0, as two secondary digests of it agree."""


def _select_speedups(arms: Arms) -> Selection:
    found = arms.measured(SPEEDUP, of=lambda arm: not arm.is_reference)
    return Selection(sorted(found, key=lambda arm: -arms.value(arm, SPEEDUP).value))


def draw_speedups(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A row per arm, the fastest at the top: speedup on the reference's text filled, free-running ones beside it."""
    axes = picture.subplots()
    shown = set()
    for row, arm in enumerate(selection.arms):
        point(axes, arm, arms.value(arm, SPEEDUP), row - 0.15, face=arm.look.colour)
        for quantity, face in _FREE.items():
            found = arms.estimate(arm, quantity)
            if found is not None:
                shown.add(quantity)
                point(axes, arm, found, row + 0.2, face=face, size=3)
    named_rows(axes, [arm.name for arm in selection.arms])
    ratio_axis(axes, "x")
    axes.set_xlabel("speedup")
    key = ["filled: reference's text, over AR-ref"]
    key += ["hollow: own text, over AR-ref"] if "speedup_vs_ar_ref" in shown else []
    key += ["grey: own text, over AR-same"] if "speedup_vs_ar_same" in shown else []
    axes.set_title("\n".join(key), loc="left")


def _select_by_task(arms: Arms) -> Selection:
    found = [arm for arm in arms.all if not arm.is_reference and arms.estimate(arm, _by_task(arm)) is not None]
    if not found:
        raise RequestError("no arm but the reference has a speedup")
    if max(arm.rows["family"].nunique() for arm in found) < 2:
        raise RequestError("the prompts are of one task family")
    kept: list[Arm] = []
    note = ""
    for temperature in sorted({arm.temperature for arm in found}):
        panel, left_out = largest(
            [arm for arm in found if arm.temperature == temperature],
            _MOST_BY_TASK,
            lambda arm: arms.value(arm, _by_task(arm)).value,
        )
        kept += panel
        note = note or left_out
    return Selection(kept, note)


def _by_task(arm: Arm) -> str:
    """Return the speedup of an arm. A sampled text cannot be forced along, so that each side decodes its own."""
    return "speedup_vs_ar_ref" if arm.temperature else SPEEDUP


def draw_by_task(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A panel per temperature: a group of points per task family, and the means at the right."""
    temperatures = sorted({arm.temperature for arm in selection.arms})
    families = list(dict.fromkeys(family for arm in selection.arms for family in arm.rows["family"]))
    means = ["all prompts", "mean of tasks"]
    centres = [*range(len(families)), *(len(families) + 0.4 + place for place in range(len(means)))]
    panels = picture.subplots(len(temperatures), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        shown = [arm for arm in selection.arms if arm.temperature == temperature]
        for place, arm in enumerate(shown):
            offset = 0.7 * ((place + 0.5) / len(shown) - 0.5)
            quantity = _by_task(arm)
            values = [arms.estimate(arm, quantity, family) for family in families]
            values += [arms.estimate(arm, quantity), arms.estimate(arm, f"{quantity}_by_family")]
            for centre, found in zip(centres, values, strict=True):
                if found is not None:
                    point(axes, arm, centre + offset, found)
        axes.axvspan(len(families) - 0.3, centres[-1] + 0.5, color="#f3f3f3", zorder=0)
        text = "each on its own text" if temperature else "along the reference's text"
        subtitle(axes, f"T = {temperature:g}, {text}", selection.note, width=style.TWO_COLUMNS)
    limits = [limit for axes in panels for limit in axes.dataLim.intervaly]
    for axes in panels:
        axes.update_datalim([(0.0, min(limits)), (0.0, max(limits))])
        ratio_axis(axes, "y")
        axes.tick_params(axis="x", length=0)
    panels[-1].set_xlim(-0.5, centres[-1] + 0.5)
    names = [family.replace("_", " ") for family in families]
    panels[-1].set_xticks(centres, [*names, *means])
    if max(map(len, names)) * len(centres) > 100:
        panels[-1].tick_params(axis="x", rotation=20)
    picture.supylabel("speedup over AR-ref", fontsize=7.5)
    named: dict[Look, Arm] = {}
    for arm in selection.arms:
        # An arm of another temperature that looks alike needs no name of its own.
        named.setdefault(arm.look, arm)
    legend(panels[0], list(named.values()), 3)


def _select_waterfall(arms: Arms) -> Selection:
    found = arms.measured(*_GAINS, of=lambda arm: arm.verifier != UNQUANTIZED and arm.drafter != NO_DRAFTER)
    common, setting = in_common_setting(found)
    kept, left_out = largest(common, _MOST_GROUPS, lambda arm: arms.value(arm, SPEEDUP).value)
    return Selection(kept, notes(setting, left_out))


def draw_waterfall(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A group of bars per arm: from 1 by quantization, speculation and their interaction to both; the paper's below."""
    axes = picture.subplots()
    row = 0.0
    ticks: list[float] = []
    names: list[str] = []
    longest = 1.0
    for arm in selection.arms:
        _group_name(axes, arm.name, row, arm.look.colour)
        start = 1.0
        for quantity in _GAINS:
            row += 1
            found = arms.value(arm, quantity)
            total = quantity == SPEEDUP
            start = 1.0 if total else start
            end = start * found.value
            axes.barh(row, end - start, left=start, height=0.66, color=arm.look.colour, alpha=1.0 if total else 0.45)
            shifted = Estimate(
                end,
                None if found.low is None else found.low * start,
                None if found.high is None else found.high * start,
            )
            interval(axes, "x", shifted, row, "black")
            longest = max(longest, end, shifted.high or end, start)
            _value(axes, QUANTITIES[quantity].form(found.value), max(start, shifted.high or end, end), row)
            ticks.append(row)
            names.append("both" if total else QUANTITIES[quantity].heading)
            start = end
        row += 1.3
    _group_name(axes, "the paper, Qwen3-8B (reported, T = 0)", row, style.GREY)
    for name, (start, end) in _PAPER.items():
        row += 1
        axes.barh(row, end - start, left=start, height=0.66, color="white", edgecolor=style.GREY, hatch="////")
        _value(axes, f"{end / start:.2f}x", end, row)
        ticks.append(row)
        names.append(name)
    axes.set_yticks(ticks, names)
    axes.set_ylim(row + 0.6, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    # The values stand to the right of the bars, and take a share of an axis that is logarithmic.
    axes.update_datalim([(longest * max(1.12, longest**0.12), 0.0)])
    ratio_axis(axes, "x")
    axes.set_xlabel(SPEEDUP_AXIS)
    subtitle(axes, selection.note)


def _group_name(axes: Axes, name: str, row: float, colour: str) -> None:
    axes.text(
        0.01,
        row,
        name,
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=style.LABEL_SIZE,
        fontweight="bold",
        color=style.ink(colour),
    )


def _value(axes: Axes, text: str, end: float, row: float) -> None:
    axes.annotate(
        text, (end, row), (3, 0), textcoords="offset points", va="center", fontsize=style.LABEL_SIZE
    ).set_in_layout(False)


def _select_draft_length(arms: Arms) -> Selection:
    fixed = arms.measured(SPEEDUP, of=lambda arm: arm.draft_tokens.isdigit())
    common, setting = in_common_setting(fixed)
    lines = {arm.pair for arm in common}
    lengths = {line: {arm.draft_tokens for arm in common if arm.pair == line} for line in lines}
    several = [arm for arm in common if len(lengths[arm.pair]) > 1]
    if not several:
        raise RequestError("no verifier and drafter was run with several fixed draft lengths (decode.draft_tokens)")
    settings = {(arm.temperature, arm.max_new_tokens) for arm in several}
    keys = {arm.pair for arm in several}
    automatic = [
        arm
        for arm in arms.all
        if arm.draft_tokens == "auto"
        and (arm.temperature, arm.max_new_tokens) in settings
        and arm.pair in keys
        and arms.estimate(arm, SPEEDUP) is not None
    ]
    return Selection([*several, *automatic], setting)


def draw_draft_length(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A line per verifier and drafter over the fixed draft lengths, its best length ringed, and auto at the right.

    A triangle below a point marks the length that `analytic_optimum` finds.
    """
    axes = picture.subplots()
    fixed = [arm for arm in selection.arms if arm.draft_tokens.isdigit()]
    right = max(int(arm.draft_tokens) for arm in fixed)
    several = len({arm.drafter for arm in fixed}) > 1
    automatic = right + max(1.0, 0.12 * right)
    names = []
    for key in dict.fromkeys(arm.pair for arm in fixed):
        line = [arm for arm in selection.arms if arm.pair == key]
        lengths = sorted((arm for arm in line if arm in fixed), key=lambda arm: int(arm.draft_tokens))
        places = [int(arm.draft_tokens) for arm in lengths]
        values = [arms.value(arm, SPEEDUP) for arm in lengths]
        look = lengths[0].look
        axes.plot(places, [found.value for found in values], color=look.colour, linestyle=look.line)
        for arm, place, found in zip(lengths, places, values, strict=True):
            point(axes, arm, place, found, face=look.colour, size=3)
        best = int(np.argmax([found.value for found in values]))
        axes.plot(places[best], values[best].value, "o", markersize=8, fillstyle="none", color=look.colour)
        optimum = analytic_optimum(arms, lengths)
        if optimum is not None:
            below = offset_copy(axes.transData, picture, y=-7, units="points")
            axes.plot(
                optimum, values[places.index(optimum)].value, "^", transform=below, markersize=4, color=look.colour
            )
        end = (float(places[-1]), values[-1].value)
        for arm in line:
            if arm.draft_tokens == "auto":
                found = arms.value(arm, SPEEDUP)
                point(axes, arm, automatic, found, face="white")
                end = (automatic, found.value)
        names.append(Name(f"{key[0]}, {key[2]}" if several else key[0], *end, look.colour))
    marks = sorted({int(arm.draft_tokens) for arm in fixed})
    ticks = marks if len(marks) <= 8 else [mark for mark in marks if mark == 1 or mark % 2 == 0]
    has_auto = len(fixed) < len(selection.arms)
    axes.set_xticks([*ticks, *([automatic] if has_auto else [])], [*map(str, ticks), *(["auto"] if has_auto else [])])
    axes.set_xlim(min(marks) - 0.4, (automatic if has_auto else right) + 0.03 * right)
    ratio_axis(axes, "y")
    axes.set_xlabel("draft length limit, tokens")
    axes.set_ylabel(SPEEDUP_AXIS)
    subtitle(axes, "ring: the best fixed length", "triangle: the best by theory", selection.note)
    name_ends(axes, names)


def analytic_optimum(arms: Arms, lengths: list[Arm]) -> int | None:
    """Return the draft length that is best if every draft token is accepted with the same probability.

    lengths: one verifier and drafter with several fixed draft lengths

    With acceptance α a step of γ draft tokens emits (1 - α^(γ+1)) / (1 - α) tokens on average (Leviathan et al. 2023,
    equation 1). α is the share of accepted tokens at draft length 1, per step, so that a step without a draft counts as
    a rejection. The time of a step with γ draft tokens is the measured one, because it does not grow in proportion to
    γ, and the optimum is searched among the measured lengths. None if length 1 or a step time was not measured.
    """
    first = next((arm for arm in lengths if arm.draft_tokens == "1"), None)
    single = None if first is None else arms.estimate(first, "mean_acceptance_length_ref")
    times = {int(arm.draft_tokens): arms.estimate(arm, "step_ms") for arm in lengths}
    if single is None or None in times.values():
        return None
    acceptance = single.value - 1
    speeds = {
        length: sum(acceptance**accepted for accepted in range(length + 1)) / found.value
        for length, found in times.items()
        if found is not None
    }
    return max(speeds, key=lambda length: speeds[length])


def _select_break_even(arms: Arms) -> Selection:
    found = arms.measured(
        "break_even_acceptance_length", "mean_acceptance_length_ref", of=lambda arm: arm.drafter != NO_DRAFTER
    )
    common, setting = in_common_setting(found)
    return Selection(common, setting)


def draw_break_even(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A point per arm: the τ that its step needs against its τ_ref; above the diagonal it is faster than AR-ref."""
    axes = picture.subplots()
    names = []
    for arm in selection.arms:
        needed = arms.value(arm, "break_even_acceptance_length")
        reached = arms.value(arm, "mean_acceptance_length_ref")
        point(axes, arm, needed, reached)
        names.append(Name(arm.name, needed.value, reached.value, arm.look.colour))
    right, top = axes.dataLim.intervalx[1] * 1.05, axes.dataLim.intervaly[1] * 1.05
    left, bottom = axes.dataLim.intervalx[0] / 1.05, min(1.0, axes.dataLim.intervaly[0])
    for ratio in _RATIO_LINES:
        # A straight line on these axes, from where it enters them to where it leaves them.
        start, end = max(left, bottom / ratio), min(right, top / ratio)
        if start < end:
            axes.plot(
                [start, end],
                [ratio * start, ratio * end],
                color=style.GREY,
                linewidth=_LINE_WIDTHS[ratio == 1],
                zorder=1,
            )
            leaves_above = end < right
            axes.annotate(
                f"{ratio:g}x",
                (end, ratio * end),
                (0, 1) if leaves_above else (2, 0),
                textcoords="offset points",
                ha="center" if leaves_above else "left",
                va="bottom" if leaves_above else "center",
                fontsize=style.FOOTER_SIZE,
                color=style.GREY,
                annotation_clip=False,
            )
    logarithmic(axes, "x", left, right)
    logarithmic(axes, "y", bottom, top)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.grid(visible=False)
    axes.set_xlabel("τ needed: time of a step over AR-ref's per token")
    axes.set_ylabel("τ_ref, tokens per step")
    subtitle(axes, "lines: speedup over AR-ref", selection.note)
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=12)
    name_points(axes, names)


def _select_steps(arms: Arms) -> Selection:
    found = arms.measured("step_ms", *(f"{part}_ms" for part in style.PARTS))
    common, setting = in_common_setting(found)
    return Selection(sorted(common, key=lambda arm: arms.value(arm, "step_ms").value), setting)


def draw_steps(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """A stacked bar per arm: the parts of its mean step, with the interval of the whole."""
    axes = picture.subplots()
    left = np.zeros(len(selection.arms))
    rows = range(len(selection.arms))
    for part, (colour, hatch) in style.PARTS.items():
        values = np.array([arms.value(arm, f"{part}_ms").value for arm in selection.arms])
        axes.barh(rows, values, left=left, height=0.6, color=colour, hatch=hatch, label=part)
        left += values
    for row, arm in enumerate(selection.arms):
        interval(axes, "x", arms.value(arm, "step_ms"), row + 0.4, arm.look.colour)
    named_rows(axes, [arm.name for arm in selection.arms])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("milliseconds per step" + (f"\n({selection.note})" if selection.note else ""))
    axes.legend(ncols=len(style.PARTS), loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0)


SPEED = (
    Figure(
        "speedup",
        "Is it faster, on the same text?",
        "Speedup of every arm on the reference's text over AR-ref, with the free-running speedups over AR-ref and "
        "AR-same beside it.",
        _TEXT_COLUMNS,
        _select_speedups,
        draw_speedups,
        lambda selection: 1.05 + 0.2 * len(selection.arms),
    ),
    Figure(
        "speedup_by_task",
        "Is it faster, and on which tasks?",
        "Speedup over AR-ref per task family and arm, with the means, a panel per temperature: at 0 along the "
        "reference's text, otherwise each on its own text.",
        (),
        _select_by_task,
        draw_by_task,
        lambda selection: 1.0 + 1.55 * len({arm.temperature for arm in selection.arms}),
        style.TWO_COLUMNS,
    ),
    Figure(
        "waterfall",
        "Where does the speedup come from?",
        "The speedup of every arm as the product of quantization alone, speculation alone and their interaction, "
        "beside what the paper reports.",
        (*_TEXT_COLUMNS, "text_ar_same_ms"),
        _select_waterfall,
        draw_waterfall,
        lambda selection: 1.3 + 0.135 * (5.3 * len(selection.arms) + 4),
    ),
    Figure(
        "draft_length",
        "How many tokens should be drafted?",
        "Speedup on the reference's text against the fixed draft length, a line per verifier, and with auto.",
        _TEXT_COLUMNS,
        _select_draft_length,
        draw_draft_length,
        lambda selection: 2.7,
    ),
    Figure(
        "break_even",
        "When does speculation pay?",
        "The acceptance length that an arm's step time needs to be as fast as AR-ref against its measured τ_ref.",
        (*_TEXT_COLUMNS, "text_tokens", "text_steps"),
        _select_break_even,
        draw_break_even,
        lambda selection: height_for_names(len(selection.arms)),
    ),
    Figure(
        "step",
        "What is a step spent on?",
        "Milliseconds per step of every arm, stacked by drafting, verification and everything else.",
        ("draft_ms", "verify_ms", "overhead_ms", "steps"),
        _select_steps,
        draw_steps,
        lambda selection: 1.05 + 0.17 * len(selection.arms),
    ),
)
