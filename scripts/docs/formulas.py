"""Turns the formulas of a page into MathML when the site is built."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</\1>', re.DOTALL)


def with_mathml(page: str) -> str:
    r"""Replace the formulas that pymdownx.arithmatex has marked, ``\(…\)`` in a span and ``\[…\]`` in a div."""

    def mathml(match: re.Match[str]) -> str:
        display = "inline" if match["open"] == "(" else "block"
        return convert(html.unescape(match["latex"]).strip(), display=display)

    return _FORMULA.sub(mathml, page)
