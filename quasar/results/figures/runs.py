"""The figures of a table of runs, a row per run; each is drawn if the table has its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from quasar.errors import RequestError
from quasar.results.figures import style
from quasar.results.figures.provenance import footer, require_comparable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOOTER_CHARACTERS = 78
"""What fits into a line of the footer at the width of one column."""
_HEIGHT, _HEIGHT_OF_NO_ROWS, _ROW = 2.4, 0.9, 0.22
"""Heights in inches: of axes with a mark per run, of axes with a row per run but without its rows, and of a row."""


@dataclass(frozen=True)
class RunsFigure:
    """A figure with a mark or a row per run.

    needs: columns without which it cannot be drawn; runs that lack a value there are left out
    logarithmic: a column on a logarithmic axis; runs that are not positive there are left out, as the reference's KL
    rows: whether each run has a row of its own
    """

    name: str
    title: str
    needs: tuple[str, ...]
    draw: Callable[[Axes, pd.DataFrame], None]
    logarithmic: str | None = None
    rows: bool = False

    def select(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the runs that have every value that the figure needs."""
        if not set(self.needs) <= set(table.columns):
            return table.iloc[:0]
        chosen = table.dropna(subset=list(self.needs))
        return chosen if self.logarithmic is None else chosen[chosen[self.logarithmic] > 0]

    def height(self, runs: int) -> float:
        """Return the height of the axes in inches."""
        return _HEIGHT_OF_NO_ROWS + _ROW * runs if self.rows else _HEIGHT


def draw_all(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw every figure that the table's columns allow into ``folder`` as PDF, SVG and PNG. Returns the files.

    table: a row per run, as `quasar.results.collect.tabulate` makes it
    Raises RequestError if the runs cannot be compared, or no figure can be drawn.
    """
    require_comparable(table)
    table = table.assign(label=labels(table))
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for figure in FIGURES:
        chosen = figure.select(table)
        if len(chosen):
            lines = footer(chosen, FOOTER_CHARACTERS)
            height = figure.height(len(chosen)) + style.FOOTER_LINE * len(lines)
            with style.canvas(figure.title, lines, height) as (canvas, axes):
                figure.draw(axes, chosen)
                files += style.save(canvas, folder / figure.name)
    if not files:
        needs = "; ".join(f"{figure.name}: {', '.join(figure.needs)}" for figure in FIGURES)
        raise RequestError(f"no figure can be drawn: no run has the metrics of one ({needs})")
    return files


def labels(table: pd.DataFrame) -> list[str]:
    """Return a name per run: its verifier, its drafter if there are several, and the options in which it differs from
    other runs of the same verifier and drafter.
    """
    options = [column for column in table.columns if column.startswith(("verifier.", "drafter.", "decode."))]
    several = table["drafter"].nunique() > 1
    found = []
    for run in table.to_dict("records"):
        pair = table[(table["verifier"] == run["verifier"]) & (table["drafter"] == run["drafter"])]
        varying = [option for option in options if pair[option].nunique(dropna=False) > 1]
        name = f"{run['verifier']}, {run['drafter']}" if several else str(run["verifier"])
        values = [f"{option.split('.', 1)[1]}={run[option]}" for option in varying if pd.notna(run[option])]
        found.append(", ".join([name, *values]))
    return found


def draw_inflation(axes: Axes, runs: pd.DataFrame) -> None:
    """Plot KL against τ (hollow) and τ_ref (filled), joined per run."""
    for run in runs.to_dict("records"):
        colour, kl = style.colour(run["verifier"]), run["kl_to_reference"]
        free, forced = run["mean_acceptance_length"], run["mean_acceptance_length_ref"]
        axes.plot([kl, kl], [free, forced], color=colour, linewidth=0.6, zorder=1)
        axes.plot(kl, free, style.marker(run["drafter"]), color=colour, markerfacecolor="white")
        axes.plot(kl, forced, style.marker(run["drafter"]), color=colour)
        _name(axes, run["label"], (kl, max(free, forced)), colour, (0, 4), "center", "bottom")
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("KL(reference ‖ verifier), nats per token")
    axes.set_ylabel("tokens per step: τ hollow, τ_ref filled")


def draw_pareto(axes: Axes, runs: pd.DataFrame) -> None:
    """Plot the bytes of a pass against KL, and join the runs that no other beats in both."""
    for run in runs.to_dict("records"):
        colour = style.colour(run["verifier"])
        place = (run["bytes_per_step"] / 1e6, run["kl_to_reference"])
        axes.plot(*place, style.marker(run["drafter"]), color=colour)
        _name(axes, run["label"], place, colour, (4, 3), "left", "bottom")
    front = runs.iloc[pareto_front(runs["bytes_per_step"].tolist(), runs["kl_to_reference"].tolist())]
    axes.step(
        front["bytes_per_step"] / 1e6, front["kl_to_reference"], where="post", color="#555555", linewidth=0.6, zorder=1
    )
    axes.set_yscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.set_xlabel("weights and KV cache read per pass, MB")
    axes.set_ylabel("KL to the reference, nats per token")


def draw_speedup(axes: Axes, runs: pd.DataFrame) -> None:
    """Plot a dot with its 95 % interval per run, the fastest at the top."""
    ordered = runs.sort_values("reference_text_speedup")
    for place, run in enumerate(ordered.to_dict("records")):
        colour, value = style.colour(run["verifier"]), run["reference_text_speedup"]
        bounds = [run[f"reference_text_speedup_ci95_{end}"] for end in ("low", "high")]
        axes.plot(bounds, [place, place], color=colour, linewidth=0.8)
        axes.plot(value, place, style.marker(run["drafter"]), color=colour)
    axes.set_yticks(range(len(ordered)), ordered["label"])
    axes.axvline(1, color="#555555", linewidth=0.6)
    _ratio_axis(axes)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("speedup over AR-ref on the same text")


def draw_positions(axes: Axes, runs: pd.DataFrame) -> None:
    """Plot, of the drafts that reached each position, the share whose tokens were accepted up to there."""
    from matplotlib.ticker import MaxNLocator

    for run in runs.to_dict("records"):
        shares = run["acceptance_by_position"]
        if not len(shares):
            continue
        colour, positions = style.colour(run["verifier"]), range(1, len(shares) + 1)
        axes.plot(positions, shares, style.marker(run["drafter"]), linestyle="-", color=colour)
        _name(axes, run["label"], (positions[-1], shares[-1]), colour, (4, 0), "left", "center")
    axes.set_ylim(0, 1)
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("share accepted up to here")


_PARTS = {
    "draft_ms": ("draft", "#56B4E9", ""),
    "verify_ms": ("verify", "#999999", "//"),
    "overhead_ms": ("other", "#000000", ""),
}


def draw_step(axes: Axes, runs: pd.DataFrame) -> None:
    """Plot a stacked bar per run: the parts of its mean step."""
    left = np.zeros(len(runs))
    for column, (name, colour, hatch) in _PARTS.items():
        values = runs[column].to_numpy(dtype=float)
        axes.barh(
            range(len(runs)), values, left=left, height=0.6, color=colour, hatch=hatch, edgecolor="white", label=name
        )
        left += values
    axes.set_yticks(range(len(runs)), runs["label"])
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.legend(ncols=len(_PARTS), loc="lower left", bbox_to_anchor=(0, 1.0))
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=16)
    axes.set_xlabel("milliseconds per step")


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


def _name(
    axes: Axes, text: str, place: tuple[float, float], colour: str, offset: tuple[float, float], across: str, up: str
) -> None:
    """Write a run's name beside its mark. offset: in points; across, up: on which side of it the text ends."""
    name = axes.annotate(
        text, place, offset, textcoords="offset points", ha=across, va=up, fontsize=style.LABEL_SIZE, color=colour
    )
    # The axes keep their size, however long a name is.
    name.set_in_layout(False)


def _ratio_axis(axes: Axes) -> None:
    """Make the x axis logarithmic, because equal distances are then equal ratios, with plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%gx"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.95), max(high, 1.6))


FIGURES: tuple[RunsFigure, ...] = (
    RunsFigure(
        "inflation",
        "Does τ show a damaged verifier?",
        ("kl_to_reference", "mean_acceptance_length", "mean_acceptance_length_ref"),
        draw_inflation,
        logarithmic="kl_to_reference",
    ),
    RunsFigure(
        "pareto", "What does a byte buy?", ("bytes_per_step", "kl_to_reference"), draw_pareto, "kl_to_reference"
    ),
    RunsFigure(
        "speedup",
        "Is it faster, on the same text?",
        ("reference_text_speedup", "reference_text_speedup_ci95_low", "reference_text_speedup_ci95_high"),
        draw_speedup,
        rows=True,
    ),
    RunsFigure("positions", "How far do drafts hold?", ("acceptance_by_position",), draw_positions),
    RunsFigure("step", "What is a step spent on?", tuple(_PARTS), draw_step, rows=True),
)
"""Every figure of ``quasar plot``, in the order in which they are drawn."""
