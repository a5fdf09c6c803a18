"""table.md of an experiment: Markdown tables of estimates with their intervals, a legend, and the footer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from quasar.results.estimates import Group, Quantity, groups, varying_conditions
from quasar.results.intervals import Estimate, holm
from quasar.results.markdown import markdown_table
from quasar.results.metric import MISSING
from quasar.results.pass_tables import pass_sections
from quasar.results.provenance import Provenance
from quasar.results.quantities import QUANTITIES, estimates

FOOTER_CHARACTERS = 118
PASS_INTERVALS = (
    "Times of passes are medians over repetitions, their ratios are taken within a repetition, and their brackets are "
    "95 % intervals (percentile bootstrap over repetitions)."
)
EMULATED = (
    "No times and no speedups: {arms}. The machine emulates the number format of these verifiers, so that their times "
    "say nothing about it."
)
_CONDITION_HEADINGS = {
    "drafter": "drafter",
    "temperature": "T",
    "max_new_tokens": "most tokens",
    "draft_tokens": "draft tokens",
}


def document(
    tables: Mapping[str, Sequence[str]],
    by_family: Sequence[str],
    rows: pd.DataFrame,
    provenance: Provenance,
    pass_tables: Sequence[str] = (),
    passes: pd.DataFrame | None = None,
) -> str:
    """Return the content of table.md.

    tables: quantities by the title of their table; a table has one line per arm and condition
    by_family: quantities that get a table with a column per task family
    pass_tables: names of tables of timed passes, which come first
    passes: the timed passes; None if there are none

    Raises KeyError for a quantity or a table that does not exist.
    """
    used = list(dict.fromkeys([*(name for names in tables.values() for name in names), *by_family]))
    parts = [f"# {provenance.experiment or 'Sweep'}"]
    if passes is not None:
        sections = pass_sections(pass_tables, passes, rows)
        parts += [f"## {table.title}\n\n{content}\n\n{_sentence(table.meaning)}" for table, content in sections]
        parts.append(PASS_INTERVALS)
    for title, names in tables.items():
        parts += [f"## {title}", _table(rows, names)]
    for name in by_family:
        parts += [f"## By task family: {QUANTITIES[name].heading}", _family_table(rows, QUANTITIES[name])]
    if used:
        parts.append("Brackets are 95 % intervals (BCa bootstrap over prompts and repetitions).")
        parts.append("\n".join(f"- {QUANTITIES[name].heading}: {QUANTITIES[name].meaning}." for name in used))
    parts += [EMULATED.format(arms=", ".join(arms))] if (arms := emulated_arms(rows)) else []
    parts.append("\n".join(provenance.footer(FOOTER_CHARACTERS)))
    return "\n\n".join(parts) + "\n"


def emulated_arms(rows: pd.DataFrame) -> list[str]:
    """Return the arms whose verifiers' number format was emulated. Results of earlier versions do not say it."""
    return list(rows[rows["emulated"]]["arm"].unique()) if "emulated" in rows else []


def _table(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """A line per group. If the first quantity is a speedup, its repetitions and the test against 1 follow."""
    conditions = varying_conditions(rows)
    found = estimates(rows, names)
    first = QUANTITIES[names[0]]
    columns = [[*_labels(group, conditions), *_cells(values)] for group, values in found]
    headings = ["arm", *(_CONDITION_HEADINGS[name] for name in conditions)]
    headings += [QUANTITIES[name].heading for name in names]
    if first.is_speedup:
        headings += ["repetitions alone", "p of no speedup (Holm)"]
        leading = [values[names[0]] for _, values in found]
        for line, value, p_value in zip(columns, leading, _adjusted(leading), strict=True):
            line += [_repetitions(first, value), p_value]
    return markdown_table(headings, columns)


def _family_table(rows: pd.DataFrame, quantity: Quantity) -> str:
    conditions = varying_conditions(rows)
    families = sorted(rows["family"].unique())
    lines = []
    for group in groups(rows):
        of_family = [group.rows[group.rows["family"] == family] for family in families]
        cells = [quantity.text(quantity.of(part, rows) if len(part) else None) for part in of_family]
        lines.append([*_labels(group, conditions), *cells])
    return markdown_table(["arm", *(_CONDITION_HEADINGS[name] for name in conditions), *families], lines)


def _labels(group: Group, conditions: Sequence[str]) -> list[str]:
    values = [group.conditions[name] for name in conditions]
    return [group.arm, *(f"{value:g}" if isinstance(value, float) else str(value) for value in values)]


def _cells(values: Mapping[str, Estimate | None]) -> list[str]:
    return [QUANTITIES[name].text(value) for name, value in values.items()]


def _repetitions(quantity: Quantity, value: Estimate | None) -> str:
    return ", ".join(map(quantity.form, value.by_repetition)) if value and value.by_repetition else MISSING


def _adjusted(found: Sequence[Estimate | None]) -> list[str]:
    """Return the two-sided bootstrap p-values that a speedup is 1, adjusted for the number of lines."""
    p_values = {
        index: value.p_of_one for index, value in enumerate(found) if value is not None and value.p_of_one is not None
    }
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [_p_text(adjusted[index]) if index in adjusted else MISSING for index in range(len(found))]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _p_text(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
