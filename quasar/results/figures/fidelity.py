"""Figures of fidelity: what damage does to τ, and what bytes buy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from quasar.errors import RequestError
from quasar.results.figures import style
from quasar.results.figures.arms import NO_DRAFTER, Arm, Arms, in_common_setting
from quasar.results.figures.figure import Figure, Selection
from quasar.results.figures.marks import Name, height_for_names, name_points, point, ratio_axis, subtitle
from quasar.results.figures.speed import SPEEDUP, SPEEDUP_AXIS
from quasar.results.intervals import Estimate

KL, BYTES = "kl_to_reference", "bytes_per_step"
TAU, TAU_REF = "mean_acceptance_length", "mean_acceptance_length_ref"
_MOST_NAMES = 9
_EQUAL_BYTES = 0.03
"""Passes whose bytes differ by at most this share are compared as equal."""


def _select_inflation(arms: Arms) -> Selection:
    found = arms.measured(KL, TAU, TAU_REF, of=lambda arm: arm.drafter != NO_DRAFTER)
    common, setting = in_common_setting(_damaged(arms, found))
    return Selection(common, setting)


def draw_inflation(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """KL against τ (hollow) and τ_ref (filled), joined per arm."""
    axes = picture.subplots()
    names = []
    gaps = {}
    for arm in selection.arms:
        kl, free, forced = (arms.value(arm, quantity) for quantity in (KL, TAU, TAU_REF))
        axes.plot([kl.value] * 2, [free.value, forced.value], color=arm.look.colour, linewidth=style.THIN, zorder=2)
        point(axes, arm, kl, free, face="white")
        point(axes, arm, kl, forced, face=arm.look.colour)
        names.append(Name(arm.name, kl.value, free.value, arm.look.colour))
        gaps[arm.name] = free.value / forced.value
    if len(names) > _MOST_NAMES:
        # The extremes: the most and the least damaged arm, and those whose τ misleads most.
        by_kl = sorted(names, key=lambda name: name.x)
        by_gap = sorted(names, key=lambda name: -gaps[name.text])
        names = list(dict.fromkeys([by_kl[0], by_kl[-1], *by_gap]))[:5]
    _kl_axis(axes.set_xscale, axes.xaxis)
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(bottom=min(1.0, axes.get_ylim()[0]))
    axes.set_xlabel("KL(reference ‖ verifier), nats per token")
    axes.set_ylabel("tokens per step")
    subtitle(axes, "hollow: τ on the own text; filled: τ_ref", selection.note)
    name_points(axes, names)


def _select_pareto(arms: Arms) -> Selection:
    found = arms.measured(KL, BYTES)
    common, setting = in_common_setting(_damaged(arms, found))
    # Arms of one verifier with several drafters have the same KL; the first stands for all.
    kept: dict[tuple[str, int, float], Arm] = {}
    for arm in sorted(common, key=lambda arm: arm.drafter == NO_DRAFTER):
        kept.setdefault((arm.verifier, arm.weight_bytes, round(arms.value(arm, KL).value, 4)), arm)
    return Selection(list(kept.values()), setting)


def draw_pareto(picture: style.Picture, arms: Arms, selection: Selection) -> None:
    """Bytes of a pass against KL, with the front and pairs of equal bytes; beside it, bytes against speed."""
    fast = [arm for arm in selection.arms if arms.estimate(arm, SPEEDUP) is not None]
    axes, *others = picture.subplots(1, 2 if fast else 1, squeeze=False)[0]
    places = {arm.name: (arms.value(arm, BYTES).value / 1e6, arms.value(arm, KL)) for arm in selection.arms}
    for arm in selection.arms:
        point(axes, arm, *places[arm.name])
    costs, errors = zip(*((bytes_, kl.value) for bytes_, kl in places.values()), strict=True)
    front = pareto_front(costs, errors)
    axes.step(
        [costs[index] for index in front],
        [errors[index] for index in front],
        where="post",
        color=style.GREY,
        linewidth=style.THIN,
        zorder=1.5,
    )
    for one, two in combinations(range(len(costs)), 2):
        families = {style.verifier_family(selection.arms[index].verifier) for index in (one, two)}
        if len(families) > 1 and "pruned" in families and abs(costs[one] / costs[two] - 1) < _EQUAL_BYTES:
            axes.plot(
                [costs[one], costs[two]], [errors[one], errors[two]], ":", color=style.GREY, linewidth=0.8, zorder=1
            )
    _kl_axis(axes.set_yscale, axes.yaxis)
    axes.margins(0.1)
    axes.set_ylabel("KL to the reference, nats per token")
    subtitle(axes, "line: Pareto front; dotted: equal bytes", selection.note, width=style.TWO_COLUMNS / 2)
    for other in others:
        for arm in fast:
            point(other, arm, places[arm.name][0], arms.value(arm, SPEEDUP))
        other.margins(x=0.1)
        ratio_axis(other, "y")
        other.set_ylabel(SPEEDUP_AXIS)
    for panel in (axes, *others):
        panel.set_xlim(left=0)
        panel.set_xlabel("weights and KV cache read per pass, MB")
    name_points(axes, [Name(arm.name, *_at(places[arm.name]), arm.look.colour) for arm in selection.arms])
    for other in others:
        names = [Name(arm.name, places[arm.name][0], arms.value(arm, SPEEDUP).value, arm.look.colour) for arm in fast]
        name_points(other, names)


def pareto_front(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Return the indices, by rising cost, of the points that no other point beats in both.

    costs [N], errors [N]: lower is better

    For example costs ``[1, 2, 3]`` with errors ``[5, 7, 4]`` give ``[0, 2]``.
    """
    order = sorted(range(len(costs)), key=lambda index: (costs[index], errors[index]))
    front: list[int] = []
    for index in order:
        if not front or errors[index] < errors[front[-1]]:
            front.append(index)
    return front


def _damaged(arms: Arms, found: Sequence[Arm]) -> list[Arm]:
    """Return the arms that have a place on a logarithmic axis of KL. Raises RequestError if none has."""
    kept = [arm for arm in found if arms.value(arm, KL).value > 0]
    if not kept:
        raise RequestError("every verifier's KL is 0, which is on no logarithmic axis")
    return kept


def _at(place: tuple[float, Estimate]) -> tuple[float, float]:
    return place[0], place[1].value


def _kl_axis(scale: Callable[[str], None], axis: Axis) -> None:
    scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


FIDELITY = (
    Figure(
        "inflation",
        "Does τ tell a good verifier from a broken one?",
        "KL to the reference against the acceptance length τ on the own text and τ_ref on the reference's text.",
        ("kl", "scored", "emitted", "steps", "text_tokens", "text_steps"),
        _select_inflation,
        draw_inflation,
        lambda selection: 2.6,
    ),
    Figure(
        "pareto",
        "What does a byte buy?",
        "Bytes that a pass reads against KL to the reference, with the Pareto front, and against the speedup.",
        ("kl", "scored", "weight_bytes", "kv_bytes_per_token"),
        _select_pareto,
        draw_pareto,
        lambda selection: height_for_names(len(selection.arms)),
        style.TWO_COLUMNS,
    ),
)
