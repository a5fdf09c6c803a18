"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["works", "falls back", "fails"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    found: what is there, and what a run uses instead if something is missing
    remedy: what to do; empty if everything works
    """

    subject: str
    state: State
    found: str
    remedy: str = ""
