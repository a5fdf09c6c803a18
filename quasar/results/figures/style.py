"""How every figure looks: sizes for print, colours by verifier family, markers by drafter, and files without dates.

Nothing else sets colours or sizes. The colours are those of Okabe and Ito (2008), which the colour-blind can tell
apart; in grey the markers do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.3
"""The width of a figure, one column of print, in inches."""

_COLOURS = {
    "fp16": "#000000",
    "int8": "#0072B2",
    "int4": "#E69F00",
    "fp8": "#CC79A7",
    "packed": "#999999",
    "pruned": "#D55E00",
    "bnb": "#009E73",
}
_OTHER_COLOUR = "#56B4E9"
_MARKERS = {"none": "_", "ngram": "o", "lookahead": "s", "layerskip": "^", "model": "D", "chain": "P", "replay": "x"}
_OTHER_MARKER = "v"
_FORMATS = ("pdf", "svg", "png")
# A date or a version in a file would change it at every redraw.
_METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
_SETTINGS: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "quasar",
    "savefig.dpi": 200,
}
LABEL_SIZE = 6.5
FOOTER_SIZE = 6
FOOTER_LINE = 0.11
"""Height of a line of the footer in inches."""


def colour(verifier: str) -> str:
    """The colour of a verifier's family, the same in every figure."""
    family = "bnb" if verifier.startswith("bnb") else verifier
    return _COLOURS.get(family, _OTHER_COLOUR)


def marker(drafter: str) -> str:
    return _MARKERS.get(drafter, _OTHER_MARKER)


@contextmanager
def canvas(title: str, footer: list[str], height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure with one pair of axes, its title, and its footer below them. height: in inches.

    The figure is not registered with pyplot, so that nothing has to close it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, loc="left")
        figure.supxlabel("\n".join(footer), fontsize=FOOTER_SIZE, color="#555555", x=0.01, ha="left")
        yield figure, axes


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.pdf, .svg and .png; the same figure gives the same bytes. Returns the files."""
    import matplotlib as mpl

    files = []
    with mpl.rc_context(_SETTINGS):
        for form in _FORMATS:
            files.append(stem.with_name(f"{stem.name}.{form}"))
            figure.savefig(files[-1], format=form, metadata=_METADATA[form])
    return files
