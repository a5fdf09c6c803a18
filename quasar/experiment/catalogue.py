"""The command ``quasar list``: what conf/ offers, each with the sentence that its YAML file begins with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quasar.config.build import node_named
from quasar.config.component import class_named
from quasar.config.schema import CONF
from quasar.drafters.base import Drafter
from quasar.errors import RequestError
from quasar.results.console import Reporter
from quasar.verifiers.base import Verifier

GROUPS = ("drafter", "verifier", "model", "data", "experiment")
_COMPONENTS = ("drafter", "verifier")


@dataclass(frozen=True)
class Entry:
    """A file of a group.

    sentence: the first sentence of its comment
    devices: types of devices that it works on, for drafters and verifiers
    output: for a drafter, whether the text is the verifier's own; for a verifier, whether it is the reference's
    """

    name: str
    sentence: str
    devices: tuple[str, ...] = ()
    output: str = ""


def print_entries(groups: Sequence[str], reporter: Reporter) -> None:
    """Print the entries of these groups, or of all if there are none. Raises RequestError for an unknown group."""
    if unknown := [group for group in groups if group not in GROUPS]:
        raise RequestError(f"{unknown[0]}: no group that can be listed; choose among {', '.join(GROUPS)}")
    for group in groups or GROUPS:
        found = entries(group)
        reporter.line(f"{group}=" + (f"NAME  ({_MEANING[group]})" if group in _MEANING else "NAME"), style="bold")
        width = max(len(entry.name) for entry in found)
        for entry in found:
            facts = f"{' '.join(entry.devices):<9}{entry.output:<10}" if entry.devices else ""
            reporter.paragraph(entry.sentence, f"  {entry.name:<{width}}  {facts}")
        reporter.line()


_MEANING = {
    "drafter": "devices; the text is: exact, the verifier's own, or simulated",
    "verifier": "devices; against the reference: exact or lossy",
}


def entries(group: str) -> list[Entry]:
    """Return the entries of a group in alphabetical order."""
    files = sorted((CONF / group).glob("*.yaml"))
    return [_entry(group, file) for file in files]


def first_sentence(file: Path) -> str:
    """Return the first sentence of a YAML file's `description`.

    A sentence ends before a capital letter, so that "et al. 2024" does not end it.
    """
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`\"'(])", description(file), maxsplit=1)[0]


def description(file: Path) -> str:
    """Return the comment that a YAML file begins with; its directives are left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _entry(group: str, file: Path) -> Entry:
    sentence = first_sentence(file)
    if group not in _COMPONENTS:
        return Entry(file.stem, sentence)
    component = class_named(node_named(group, file.stem)["_target_"], f"{group}._target_")
    if issubclass(component, Drafter):
        return Entry(file.stem, sentence, component.devices, "simulated" if component.simulates else "exact")
    assert issubclass(component, Verifier)
    return Entry(file.stem, sentence, component.devices, "exact" if component.is_reference else "lossy")
