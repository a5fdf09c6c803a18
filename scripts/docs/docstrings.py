"""Prepares docstrings for Markdown, which would join the lines that explain arguments into one paragraph."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*):\s+(.+)$")


class ListedArguments(griffe.Extension):
    """Turns the lines ``name: meaning`` of every docstring into a list."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    """Return a docstring in which each paragraph of lines ``name: meaning`` is a list in Markdown.

    Example: ``rows: how many`` becomes ``- `rows`: how many``. A line that is indented belongs to the line before it.
    """
    return "\n\n".join(_listed(paragraph) for paragraph in docstring.split("\n\n"))


def _listed(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if not lines or not _ARGUMENT.match(lines[0]):
        return paragraph
    items: list[str] = []
    for line in lines:
        argument = _ARGUMENT.match(line)
        if argument:
            names = ", ".join(f"`{name}`" for name in argument[1].split(", "))
            items.append(f"- {names}: {argument[2]}")
        else:
            items[-1] += f" {line.strip()}"
    return "\n".join(items)
