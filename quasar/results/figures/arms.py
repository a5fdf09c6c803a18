"""The arms of an experiment as figures see them: their settings, their look and their estimates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from quasar.errors import RequestError
from quasar.results.estimates import UNQUANTIZED, Group, Quantity, groups
from quasar.results.figures import style
from quasar.results.intervals import Estimate
from quasar.results.quantities import QUANTITIES
from quasar.results.rows import CONDITIONS

NO_DRAFTER = "none"
_CONDITION_TEXTS = {
    "drafter": "{}",
    "temperature": "T = {:g}",
    "max_new_tokens": "{} tokens",
    "draft_tokens": "γ = {}",
}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn. fill: the filling of its marker"""

    colour: str
    marker: str
    line: str
    fill: str


@dataclass(frozen=True, eq=False)
class Arm:
    """An arm under one set of conditions, and its rows.

    name, plain_name: the arm's name with the conditions that vary within an arm, and the same without the temperature
    draft_tokens: text, empty if the drafter decides
    """

    name: str
    plain_name: str
    verifier: str
    drafter: str
    temperature: float
    max_new_tokens: int
    draft_tokens: str
    weight_bytes: int
    rows: pd.DataFrame
    look: Look

    @property
    def pair(self) -> tuple[str, int, str]:
        """What its verifier and drafter are, apart from the other settings."""
        return self.verifier, self.weight_bytes, self.drafter

    @property
    def is_reference(self) -> bool:
        """Whether it is autoregressive decoding with the unquantized verifier, to which speedups compare."""
        return self.verifier == UNQUANTIZED and self.drafter == NO_DRAFTER


class Arms:
    """The arms of an experiment. Every estimate is computed only once."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows
        found = [(group, group.rows.iloc[0]) for group in groups(rows)]
        looks = _looks([first for _, first in found])
        varying = [name for name in CONDITIONS if (rows.groupby("arm")[name].nunique() > 1).any()]
        plain = [name for name in varying if name != "temperature"]
        self.all = [
            Arm(
                _name(group, varying),
                _name(group, plain),
                str(first["verifier"]),
                str(first["drafter"]),
                float(first["temperature"]),
                int(first["max_new_tokens"]),
                str(first["draft_tokens"]),
                int(first["weight_bytes"]),
                group.rows,
                look,
            )
            for (group, first), look in zip(found, looks, strict=True)
        ]
        self._known: dict[tuple[Arm, str, str | None], Estimate | None] = {}

    def estimate(self, arm: Arm, quantity: str | Quantity, family: str | None = None) -> Estimate | None:
        """Return the estimate of a quantity over an arm, or over its prompts of one task family.

        A value that is not finite, such as a ratio without a single step, counts as not measured.
        """
        described = QUANTITIES[quantity] if isinstance(quantity, str) else quantity
        key = (arm, described.name, family)
        if key not in self._known:
            rows = arm.rows if family is None else arm.rows[arm.rows["family"] == family]
            found = None if rows.empty else described.of(rows, self.rows)
            self._known[key] = found if found is not None and np.isfinite(found.value) else None
        return self._known[key]

    def value(self, arm: Arm, quantity: str) -> Estimate:
        """Return an estimate that `measured` has found."""
        found = self.estimate(arm, quantity)
        assert found is not None
        return found

    def measured(self, *quantities: str, of: Callable[[Arm], bool] = lambda arm: True) -> list[Arm]:
        """Return the arms that have all these quantities. Raises RequestError if there is none.

        of: which arms are wanted
        """
        wanted = [arm for arm in self.all if of(arm)]
        found = [arm for arm in wanted if all(self.estimate(arm, name) is not None for name in quantities)]
        if not found:
            lacking = [name for name in quantities if all(self.estimate(arm, name) is None for arm in wanted)]
            what = " and ".join(QUANTITIES[name].heading for name in lacking or quantities)
            kind = "no arm" if len(wanted) == len(self.all) else "no arm of the kind that it shows"
            raise RequestError(f"{kind} has {what}")
        return found


def in_common_setting(arms: Sequence[Arm]) -> tuple[list[Arm], str]:
    """Return the arms of the temperature and answer length that most arms have, the lower ones if there are several,
    and a note on that choice, empty if all arms are alike.
    """
    counts = Counter((arm.temperature, arm.max_new_tokens) for arm in arms)
    temperature, length = min(counts, key=lambda setting: (-counts[setting], setting))
    kept = [arm for arm in arms if (arm.temperature, arm.max_new_tokens) == (temperature, length)]
    return kept, "" if len(counts) == 1 else f"T = {temperature:g}, at most {length} tokens"


def largest(
    arms: Sequence[Arm], number: int, key: Callable[[Arm], float], words: str = "fastest"
) -> tuple[list[Arm], str]:
    """Return the ``number`` arms with the largest keys, in their order, and a note if some are left out."""
    if len(arms) <= number:
        return list(arms), ""
    kept = sorted(arms, key=key, reverse=True)[:number]
    return [arm for arm in arms if arm in kept], f"the {number} {words} of {len(arms)} arms"


def notes(*found: str) -> str:
    """Join the notes that are not empty."""
    return "; ".join(note for note in found if note)


def _name(group: Group, conditions: Sequence[str]) -> str:
    """Return an arm's name with the values of conditions, such as ``int8, ngram, T = 1``."""
    values = [
        _CONDITION_TEXTS[name].format(group.conditions[name]) for name in conditions if group.conditions[name] != ""
    ]
    return ", ".join([group.arm, *values])


def _looks(firsts: Iterable[pd.Series]) -> list[Look]:
    """Return a look per arm, given its first row: the colour by the verifier's family, darker for fewer bytes, the
    marker by the drafter, and another fill for every further arm of the same setting that these do not tell apart.
    """
    known = list(firsts)
    sizes: dict[str, list[int]] = {}
    for first in known:
        sizes.setdefault(style.verifier_family(str(first["verifier"])), []).append(int(first["weight_bytes"]))
    looks = []
    seen: Counter[tuple[object, ...]] = Counter()
    for first in known:
        verifier, drafter = str(first["verifier"]), str(first["drafter"])
        distinct = sorted(set(sizes[style.verifier_family(verifier)]), reverse=True)
        colour = style.colours(verifier, len(distinct))[distinct.index(int(first["weight_bytes"]))]
        alike = (colour, drafter, float(first["temperature"]), int(first["max_new_tokens"]))
        fill = style.FILLS[seen[alike] % len(style.FILLS)]
        seen[alike] += 1
        looks.append(Look(colour, style.marker(drafter), style.line(drafter), fill))
    return looks
