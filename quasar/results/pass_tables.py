"""The tables of table.md that are made from timed passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from quasar.results.intervals import Estimate
from quasar.results.markdown import markdown_table
from quasar.results.metric import MISSING
from quasar.results.passes import BEND, PassTimes, pass_times, speculations

Content = Callable[[Sequence[PassTimes], pd.DataFrame], tuple[list[str], list[list[str]]]]
"""Makes a table's headings and lines from the times of all arms and contexts and the rows of `quasar.results.rows`."""


@dataclass(frozen=True)
class PassTable:
    """A table, with a sentence on what it shows."""

    title: str
    meaning: str
    content: Content


def pass_sections(names: Sequence[str], passes: pd.DataFrame, rows: pd.DataFrame) -> list[tuple[PassTable, str]]:
    """Return the tables with these names, each as Markdown. Raises KeyError for an unknown name.

    passes: the table of `quasar.results.pass_rows`
    rows: the table of `quasar.results.rows`
    """
    times = pass_times(passes)
    return [(table, markdown_table(*table.content(times, rows))) for table in (PASS_TABLES[name] for name in names)]


def _grid(of: Callable[[PassTimes, float], Estimate], form: Callable[[float], str]) -> Content:
    """Return the content of a table with a line per arm and context, and a column per number of rows."""

    def content(times: Sequence[PassTimes], rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
        numbers = sorted({int(number) for found in times for number in found.rows})
        lines = [
            [
                found.arm,
                str(found.context),
                *(of(found, number).text(form) if number in found.rows else MISSING for number in numbers),
            ]
            for found in times
        ]
        return ["arm", "context", *(f"M = {number}" for number in numbers)], lines

    return content


def _bends(times: Sequence[PassTimes], rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    contexts = list(dict.fromkeys(found.context for found in times))
    lines = []
    for arm in dict.fromkeys(found.arm for found in times):
        own = {found.context: found for found in times if found.arm == arm}
        lines.append([arm, *(_bend_text(own[context]) if context in own else MISSING for context in contexts)])
    return ["arm", *(f"context {context}" for context in contexts)], lines


def _bend_text(times: PassTimes) -> str:
    def form(value: float) -> str:
        return f"> {times.rows[-1]}" if math.isinf(value) else f"{value:.1f}"

    return times.bend().text(form)


def _break_even(times: Sequence[PassTimes], rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    lines = [
        [
            found.group.arm,
            f"{found.draft_tokens:.2f}",
            str(found.context),
            found.needed.text(_2),
            found.tau_ref.text(_2),
            found.predicted.text(_times),
            found.measured.text(_times),
            found.residual.text(_2),
        ]
        for found in speculations(times, rows)
    ]
    headings = ["arm", "γ", "context", "τ needed", "τ_ref", "predicted speedup", "measured speedup", "residual"]
    return headings, lines


_2, _times, _percent = "{:.2f}".format, "{:.2f}x".format, "{:.0%}".format

PASS_TABLES: dict[str, PassTable] = {
    "pass_ms": PassTable(
        "Time of a pass, ms",
        "milliseconds of a verification pass with M rows, the last token and M - 1 draft tokens",
        _grid(PassTimes.milliseconds, _2),
    ),
    "relative_time": PassTable(
        "Time of a pass over its time with one row",
        "t(M) / t(1) of the same verifier; it stays at 1 as long as the pass is bound by memory",
        _grid(PassTimes.relative_time, _2),
    ),
    "cost": PassTable(
        "Cost of a pass, which is the τ that a verifier needs",
        "t(M) / t_ref(1), the time of a pass over the reference's pass with one row; a draft of M - 1 tokens pays if a "
        "step emits more tokens than this, drafting apart",
        _grid(PassTimes.cost, _2),
    ),
    "bandwidth_share": PassTable(
        "Share of the copy bandwidth",
        "weights, keys and values that a pass reads per second over the copy bandwidth of the same repetition; more "
        "than 100 % is possible, because a copy writes as much as it reads",
        _grid(PassTimes.bandwidth_share, _percent),
    ),
    "bend": PassTable(
        "Where verification stops being bound by memory",
        f"number of rows M at which a pass takes {BEND} times as long as with one row",
        _bends,
    ),
    "break_even": PassTable(
        "When speculation pays, and the speedup that follows from τ_ref and the cost",
        "γ is the mean draft length of the steps, τ needed the mean over the steps of t(γ + 1) / t_ref(1) behind the "
        "measured context nearest to theirs, predicted = τ_ref / τ needed, and residual = measured / predicted",
        _break_even,
    ),
}
"""Every table of timed passes, by its name in ``publish.pass_tables``."""
