"""Printed tables and sentences fit the width of the terminal, and no number is broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from quasar.results.console import PLAIN_WIDTH, Reporter, _Console
from quasar.results.layout import Column, fit
from quasar.results.measured import Measured
from quasar.results.metrics import METRICS, compute, ranked
from quasar.results.report import print_report
from quasar.results.schema import PromptRecord
from tests.records import facts, turn

NUMBERS = st.floats(0, 1e5).map("{:.3f}x".format) | st.just("-")


@pytest.fixture(autouse=True)
def piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(width=st.integers(40, 200), data=st.data())
def test_a_table_of_any_width_fits_and_has_its_first_ranks_unbroken(
    width: int, data: st.DataObject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    families = data.draw(st.lists(st.text("abcdef_", min_size=1, max_size=30), min_size=1, max_size=3))
    ranks = data.draw(st.permutations(range(1, 13)))
    columns = [Column("task family", tuple(families), is_text=True)]
    for rank in ranks:
        values = data.draw(st.lists(NUMBERS, min_size=len(families), max_size=len(families)))
        columns.append(Column(f"h{rank}", tuple(values), rank))
    capsys.readouterr()
    Reporter().fitted_table("title", columns, "elsewhere")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(cell_len, lines)) <= width

    headings = next(cells_of(line) for line in lines if "task family" in line)[1:]
    shown = {int(heading[1:]) for heading in headings}
    assert shown == set(range(1, len(shown) + 1)), "the first ranks are shown"
    assert headings == [f"h{rank}" for rank in ranks if rank in shown], "in the table's order"
    numbers = {line for line in map(tuple, map(cells_of, lines)) if line and line[0] != "task family"}
    for place in range(len(families)):
        wanted = tuple(column.cells[place] for column in columns[1:] if column.rank in shown)
        assert any(line[1:] == wanted for line in numbers), "every number is whole and in its line"

    dropped = [f"h{rank}" for rank in ranks if rank not in shown]
    words = (
        re.findall(r"h\d+", " ".join(lines[lines.index(next(x for x in lines if "Not shown" in x)) :]))
        if dropped
        else []
    )
    assert words == dropped
    if dropped:
        first = min(int(name[1:]) for name in dropped)
        wider = [
            *(
                min(24, max(map(len, (c.heading, *c.cells)))) if c.is_text else max(map(len, (c.heading, *c.cells)))
                for c in columns
                if c.is_text or c.rank in shown or c.rank == first
            )
        ]
        assert 1 + sum(wider) + 3 * len(wider) > width, "one more column would not fit"


def a_run() -> Measured:
    records = [
        PromptRecord(str(key), family, [turn([4, 2], [2, 0])]) for key, family in enumerate(("math", "summarization"))
    ]
    return Measured(records, facts())


def test_the_table_of_a_run_in_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run()
    print_report(Reporter(), run, compute(run), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert PLAIN_WIDTH == 80
    files = [line for line in lines if line.startswith("wrote ")]
    assert max(len(line) for line in lines if line not in files) <= 80
    headings = next(cells_of(line) for line in lines if "task family" in line)
    assert headings == ["task family", "tokens/s", "τ", "τ_ref", "KL", "vs AR-same", "vs AR-ref"]
    text = " ".join(lines)
    assert (
        "Not shown in 80 characters: prompts, tokens, top-1, accept, step ms, = AR-same; summary.json has them." in text
    )
    assert "lossless with respect to the INT4 model only, not to the reference." in text
    assert [line for line in lines if "lossless" in line] != [line for line in lines if "reference." in line], "wrapped"


def test_tau_is_never_shown_without_tau_ref_and_fidelity() -> None:
    names = [metric.name for metric in ranked()]
    assert {"mean_acceptance_length_ref", "kl_to_reference"} < set(names[: names.index("mean_acceptance_length")])
    assert [metric.rank for metric in ranked()] == list(range(1, len(names) + 1))
    columns = [Column(metric.heading, ("123456",), metric.rank) for metric in METRICS if metric.rank is not None]
    for width in range(200):
        shown = {column.heading for column in fit(columns, width).shown}
        assert "τ" not in shown or {"τ_ref", "KL"} <= shown


def test_a_terminal_and_plain_output_show_the_same_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run()
    reporter = Reporter()
    reporter.interactive = True
    reporter.console = _Console(highlight=False, force_terminal=True, color_system="truecolor", width=80)
    print_report(reporter, run, compute(run), Path())
    colored = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    print_report(Reporter(), run, compute(run), Path())
    plain = capsys.readouterr().out
    rows = [
        [re.split(r"[\s|]+", line.strip(" |")) for line in text.splitlines() if line.strip(" |").startswith("math")]
        for text in (colored, plain)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1
    assert max(map(cell_len, colored.splitlines())) <= 80


def test_a_notebook_shows_the_table_of_plain_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: shown.append(text))
    run = a_run()
    print_report(Reporter(), run, compute(run), Path())
    lines = re.sub(r"\x1b\[[0-9;]*m", "", "".join(shown)).splitlines()
    headings = next(cells_of(line) for line in lines if "task family" in line)
    assert headings == ["task family", "tokens/s", "τ", "τ_ref", "KL", "vs AR-same", "vs AR-ref"]


def test_sentences_wrap_at_spaces_and_paths_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/" + "folder/" * 20
    reporter = Reporter()
    reporter.header({"model": "word " * 30 + "end", "output": path})
    reporter.warning("numbers " * 12 + "1.25x-2.5x")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model   word word")
    assert lines[1].startswith("        word word")
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert f"output  {path}" in lines
    assert lines[-1] == " " * 9 + "numbers " * 3 + "1.25x-2.5x"


def test_text_gives_way_to_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    interval = "-753.95 to -461.13, of 12 prompts"
    Reporter().table("title", ["arm", "interval"], [["ngram int8", interval]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 44
    assert any(cells_of(line)[-1:] == [interval] for line in lines)
