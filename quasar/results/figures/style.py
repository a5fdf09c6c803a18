"""How every figure looks: sizes for print, colours by verifier family, markers by drafter, and files without dates.

Nothing else sets colours or sizes. The colours are those of Okabe and Ito (2008), which the colour-blind can tell
apart; in grey the markers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure as MatplotlibFigure

ONE_COLUMN, TWO_COLUMNS = 3.3, 7.0
"""Widths of a figure in inches."""
LABEL_SIZE = 6.5
FOOTER_SIZE = 6
INTERVAL_WIDTH = 0.8
THIN = 0.6
GREY, LIGHT_GREY = "#555555", "#cccccc"
BELOW, ABOVE = "#D55E00", "#0072B2"
"""The ends of the diverging scale."""
PARTS = {"draft": ("#56B4E9", ""), "verify": ("#999999", ""), "overhead": ("#000000", "")}
"""Colour and hatch of a step's parts."""
FILLS = ("full", "none", "left", "right", "bottom", "top")
"""Fills of the markers of arms that are otherwise drawn alike."""
FORMATS = ("pdf", "svg", "png")

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
_MARKERS = {
    "none": "_",
    "ngram": "o",
    "suffix_automaton": "h",
    "lookahead": "s",
    "lookahead_paper": "8",
    "recycling": "p",
    "mixture": "*",
    "layerskip": "^",
    "model": "D",
    "chain": "P",
    "replay": "X",
}
_OTHER_MARKER = "v"
_LINES = {"none": ":", "ngram": "-", "lookahead": "--", "layerskip": "-.", "model": (0, (5, 1, 1, 1, 1, 1))}
# A date or a version in a file would change it at every redraw.
_METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": LABEL_SIZE,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "figure.titlesize": 8,
    "figure.titleweight": "bold",
    "legend.fontsize": LABEL_SIZE,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
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
_FOOTER_LINE = 0.105
"""Height of a line of the footer in inches."""
_FOOTER_CHARACTERS = 21
"""Characters of the footer per inch."""
_SUBTITLE_CHARACTERS = 20


class Picture(MatplotlibFigure):
    """A figure that Jupyter shows with the same settings as the files."""

    def _repr_png_(self) -> bytes:
        stream = BytesIO()
        with mpl.rc_context(_SETTINGS):
            self.savefig(stream, format="png", metadata=_METADATA["png"])
        return stream.getvalue()


def verifier_family(verifier: str) -> str:
    """Return the family that a verifier is coloured by, such as ``bnb`` for ``bnb_nf4``."""
    return next((family for family in _COLOURS if verifier.startswith(family)), verifier)


def colours(verifier: str, number: int = 1) -> list[str]:
    """Return a colour for each of a family's ``number`` verifiers, from light to dark; one has the family's own."""
    base = _COLOURS.get(verifier_family(verifier), _OTHER_COLOUR)
    if number == 1:
        return [base]
    shades = [-0.35 + 0.8 * place / (number - 1) for place in range(number)]
    return [_mixed(base, "#ffffff", -shade) if shade < 0 else _mixed(base, "#000000", shade) for shade in shades]


def ink(colour: str) -> str:
    """Return a darker shade of a colour for text, which needs more contrast than marks."""
    return _mixed(colour, "#000000", 0.3)


def marker(drafter: str) -> str:
    return _MARKERS.get(drafter, _OTHER_MARKER)


def line(drafter: str) -> Any:
    """Return the line style of a drafter."""
    return _LINES.get(drafter, (0, (1, 1)))


def diverging(value: float) -> str:
    """Return the colour of a value from -1 to 1: white at 0."""
    return _mixed("#ffffff", ABOVE if value > 0 else BELOW, 0.75 * min(1.0, abs(value)))


@contextmanager
def canvas(title: str, footer: Sequence[str], size: tuple[float, float]) -> Iterator[Picture]:
    """Yield an empty figure with its title at the top and its footer below. The footer's height is added to the size.

    The figure is not registered with pyplot, so that nothing has to close it.

    size: width and height in inches
    """
    with mpl.rc_context(_SETTINGS):
        height = size[1] + _FOOTER_LINE * len(footer)
        figure = Picture(figsize=(size[0], height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left")
        figure.supxlabel("\n".join(footer), fontsize=FOOTER_SIZE, color=GREY, x=0.01, ha="left")
        yield figure


def footer_characters(width: float) -> int:
    """Return the number of the footer's characters that fit into a line. width: in inches"""
    return int(width * _FOOTER_CHARACTERS)


def subtitle_characters(width: float) -> int:
    """Return the number of a subtitle's characters that fit into a line. width: of the axes in inches"""
    return int(width * _SUBTITLE_CHARACTERS)


def save(figure: Picture, stem: Path) -> list[Path]:
    """Write ``stem``.pdf, .svg and .png; the same figure gives the same bytes. Returns the files."""
    files = []
    with mpl.rc_context(_SETTINGS):
        for form in FORMATS:
            files.append(stem.with_name(f"{stem.name}.{form}"))
            figure.savefig(files[-1], format=form, metadata=_METADATA[form])
    return files


def _mixed(colour: str, other: str, share: float) -> str:
    mixed = [(1 - share) * one + share * two for one, two in zip(to_rgb(colour), to_rgb(other), strict=True)]
    return to_hex((mixed[0], mixed[1], mixed[2]))
