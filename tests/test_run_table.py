"""The table that `quasar collect` prints: its columns, order and formats, and that it fits the terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quasar.cli import app
from quasar.results.run_table import MOST_RUNS
from tests.test_collect import begun, finished


def collected(root: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["collect", str(root), *options])
    assert done.exit_code == 0, done.output
    return done.output


def rows_of(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Two finished runs, of 10 and 40.25 tokens/s, and a failed one."""
    finished(tmp_path / "a", "verifier=int8", speedup_ci95=[1.1, 1.3], weight_bytes=3_000_000)
    begun(tmp_path / "b", "verifier=int8").status("failed", "no")
    finished(tmp_path / "c", "verifier=int4", "verifier.group_size=32", tokens_per_second=40.25, kl_to_reference=0.125)
    return tmp_path


def test_by_default_the_finished_runs_with_the_first_metrics_that_fit(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = collected(three)
    assert max(len(line) for line in output.splitlines() if not line.startswith("wrote")) <= 80
    rows = rows_of(output)
    assert ["int8, lookahead", "1", "-", "-", "1", "-", "2"] in rows, "the states"
    place = next(index for index, row in enumerate(rows) if row[0] == "run" and row[1] == "arm")
    assert rows[place][:2] == ["run", "arm"]
    assert rows[place][2:] == ["tokens/s", "τ", "τ_ref", "KL", "accept", "vs AR-same", "vs AR-ref"]
    assert [row[0] for row in rows[place + 1 :]] == ["a", "c"]
    assert rows[place + 2] == ["c", "int4", "40.2", "-", "-", "0.1250", "-", "-", "-"]
    assert "Not shown in 80 characters: prompts, tokens, top-1, step ms, = AR-same;" in output


def test_chosen_columns_in_the_chosen_order(three: Path) -> None:
    output = collected(
        three, "--columns", "weight_bytes, speedup_ci95,verifier.group_size", "--sort=-tokens_per_second"
    )
    assert rows_of(output) == [
        ["run", "arm", "status", "weights MB", "95 % interval", "verifier.group_size"],
        ["c", "int4", "done", "-", "-", "32"],
        ["a", "int8", "done", "3", "1.10x to 1.30x", "-"],
        ["b", "int8", "failed", "-", "-", "-"],
    ]
    ascending = rows_of(collected(three, "--sort", "tokens_per_second"))
    assert [row[0] for row in ascending[1:]] == ["a", "c", "b"], "runs without a value are last"


def test_a_narrow_table_keeps_the_columns_that_are_named_first(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    output = collected(three, "--columns", "tokens_per_second,speedup_ci95,weight_bytes,prompts")
    assert rows_of(output)[0] == ["run", "arm", "status", "tokens/s"]
    assert "95 % interval, weights MB, prompts;" in " ".join(output.split())


def test_csv_has_raw_values_and_nothing_else(three: Path) -> None:
    output = collected(three, "--format", "csv", "--columns", "tokens_per_second,speedup_ci95")
    rows = list(csv.DictReader(io.StringIO(output)))
    assert list(rows[0]) == ["run", "arm", "status", "tokens_per_second", "speedup_ci95_low", "speedup_ci95_high"]
    assert [row["tokens_per_second"] for row in rows] == ["10.0", "", "40.25"]
    assert (rows[0]["speedup_ci95_low"], rows[0]["speedup_ci95_high"]) == ("1.1", "1.3")


def test_markdown_has_the_texts_of_the_table_and_nothing_else(three: Path) -> None:
    output = collected(three, "--format", "markdown", "--columns", "kl_to_reference")
    assert output.splitlines() == [
        "| run | arm | status | KL |",
        "| --- | ---: | ---: | ---: |",
        "| a | int8 | done | - |",
        "| b | int8 | failed | - |",
        "| c | int4 | done | 0.1250 |",
    ]


def test_a_wrong_name_is_refused_with_the_nearest_ones(three: Path) -> None:
    for options in (["--columns", "tokens_per_sec"], ["--sort", "-tokens_per_sec"]):
        refused = CliRunner().invoke(app, ["collect", str(three), *options])
        assert refused.exit_code == 2
        assert "tokens_per_sec: no such column; did you mean tokens_per_second" in refused.output
    wrong = CliRunner().invoke(app, ["collect", str(three), "--format", "latex"])
    refusal = "error: --format latex: must be one of table, markdown, csv, spec-bench, specdec-bench\n"
    assert (wrong.exit_code, wrong.output) == (2, refusal)


def test_a_large_sweep_shows_its_first_runs_unless_the_user_asks(tmp_path: Path) -> None:
    for number in range(MOST_RUNS + 2):
        finished(tmp_path / str(number), f"seed={number}")
    runs = [row for row in rows_of(collected(tmp_path)) if row[0].isdigit()]
    assert len(runs) == MOST_RUNS
    assert "... 2 more runs in the written table" in collected(tmp_path)
    assert len([row for row in rows_of(collected(tmp_path, "--sort", "seed")) if row[0].isdigit()]) == MOST_RUNS + 2
