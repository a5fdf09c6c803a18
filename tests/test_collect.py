"""`quasar collect`: one row per run in any state, one column per key that varies, and its messages."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from quasar.cli import app
from quasar.config.schema import CONF
from quasar.results.collect import Collector, tabulate
from quasar.results.overview import LISTED, STATUS_ROWS, remarks, status_rows, unfinished_rows
from quasar.results.runs import StoredRun, read_run
from quasar.results.schema import PromptRecord
from quasar.results.store import RunFolder
from scripts.simulate_sweep import main as simulate
from tests.compose import composed
from tests.records import environment, turn


def begun(folder: Path, *overrides: str) -> RunFolder:
    run = RunFolder(folder, composed("model=tiny", *overrides), resume=True)
    run.begin(["run.py"], environment(prompts=2))
    return run


def finished(folder: Path, *overrides: str, **metrics: object) -> None:
    run = begun(folder, *overrides)
    run.append(PromptRecord("1", "chat", [turn([1], [1])]))
    run.append(PromptRecord("2", "chat", [turn([1], [1])]))
    run.finish({"model": "tiny", "prompts": 2, "tokens_per_second": 10.0, "speedup_ci95": None, **metrics})


def killed(run: RunFolder) -> None:
    """The lock is released when the process ends."""
    run._lock.release()


def table(root: Path) -> pd.DataFrame:
    return tabulate(Collector(root).runs(), root).set_index("run")


def test_every_state_has_its_row(tmp_path: Path) -> None:
    finished(tmp_path / "0", "drafter=ngram", speedup_ci95=[1.1, 1.3])
    begun(tmp_path / "1", "drafter=none").status("failed", "Traceback:\nValueError: no")
    cut = begun(tmp_path / "2", "verifier=fp16")
    cut.append(PromptRecord("1", "chat", [turn([1], [1])]))
    with (tmp_path / "2/generations.jsonl").open("a") as stream:
        stream.write('{"question_id": "2", "tur')
    killed(cut)
    running = begun(tmp_path / "10")
    manifest = {"jobs": [{"folder": "11", "overrides": ["verifier=int8", "drafter=ngram"]}]}
    (tmp_path / "sweep.json").write_text(json.dumps(manifest))

    rows = table(tmp_path)
    assert list(rows.index) == ["0", "1", "2", "10", "11"]
    assert list(rows.status) == ["done", "failed", "partial", "running", "pending"]
    assert list(rows.prompts_done) == [2, 0, 1, 0, 0]
    assert rows.error["1"] == "Traceback:\nValueError: no"
    assert "killed" in rows.error["2"]
    assert list(rows.drafter[:4]) == ["ngram", "none", "lookahead", "lookahead"]
    assert rows.overrides["11"] == "verifier=int8 drafter=ngram"
    assert rows.tokens_per_second["0"] == 10.0
    assert rows.tokens_per_second[1:].isna().all()
    assert (rows.speedup_ci95_low["0"], rows.speedup_ci95_high["0"]) == (1.1, 1.3)
    killed(running)
    assert table(tmp_path).status["10"] == "partial"


def test_columns_are_the_keys_that_vary(tmp_path: Path) -> None:
    finished(tmp_path / "a", "drafter=ngram", "seed=1", "output_dir=x")
    finished(tmp_path / "b", "drafter=ngram", "drafter.num_tokens=7", "output_dir=y")
    finished(tmp_path / "c", "drafter=none", "decode.draft_tokens=5")
    rows = table(tmp_path)
    varying = [column for column in rows.columns if "." in column or column == "seed"]
    # Only the n-gram drafter's options that are set are columns; the other run has none of them.
    options = OmegaConf.load(CONF / "drafter/ngram.yaml")
    own = {f"drafter.{key}" for key, value in options.items() if key not in ("_target_", "name") and value is not None}
    assert "drafter.corpus" not in own
    assert set(varying) == {*own, "decode.draft_tokens", "seed"}
    assert list(rows["drafter.num_tokens"].fillna(0)) == [5, 7, 0]
    assert list(rows.seed) == [1, 0, 0]
    assert rows["drafter.num_tokens"].dtype == "Int64"


def test_parquet_and_csv_hold_the_same_table(tmp_path: Path) -> None:
    finished(tmp_path / "a", "drafter=layerskip", "drafter.skip_layers=[1,2]", acceptance_by_position=[0.5, 0.25])
    finished(tmp_path / "b", "drafter=layerskip", acceptance_by_position=None)
    done = CliRunner().invoke(app, ["collect", str(tmp_path)])
    assert done.exit_code == 0, done.output
    parquet = pd.read_parquet(tmp_path / "collected.parquet").set_index("run")
    csv = pd.read_csv(tmp_path / "collected.csv", index_col="run")
    assert list(parquet.acceptance_by_position["a"]) == [0.5, 0.25]
    assert json.loads(csv.acceptance_by_position["a"]) == [0.5, 0.25]
    assert json.loads(csv["drafter.skip_layers"]["a"]) == [1, 2]
    assert pd.isna(csv["drafter.skip_layers"]["b"])
    assert list(csv.columns) == list(parquet.columns)
    assert list(csv.tokens_per_second) == list(parquet.tokens_per_second)


@pytest.mark.parametrize("name", ["status.json", "summary.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"", b'{"prompts": ', b"\x00\x00\x00", b"[1]"])
def test_damaged_files_make_a_run_partial(tmp_path: Path, name: str, content: bytes) -> None:
    finished(tmp_path / "0")
    (tmp_path / "0" / name).write_bytes(content)
    run = read_run(tmp_path / "0")
    assert run.status == "partial"
    assert name in str(run.error)
    assert len(table(tmp_path)) == 1


def test_machines_and_versions_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("alpha", "beta"):
        monkeypatch.setattr("socket.gethostname", lambda name=machine: name)
        finished(tmp_path / machine)
    begun(tmp_path / "alpha").finish({"prompts": 2})
    monkeypatch.setattr("quasar.results.store.code_version", lambda: "0123456789ab")
    finished(tmp_path / "gamma")
    rows = table(tmp_path)
    assert list(rows.machine) == ["alpha + beta", "beta", "beta"]
    assert rows.code_version["gamma"] == "0123456789ab"
    notes = remarks(Collector(tmp_path).runs())
    assert notes[0].startswith("runs on 2 machines (alpha, beta)")
    assert notes[1].startswith("1 runs were continued on another machine")
    assert notes[2].startswith("runs used 2 versions of the code")


def test_tables_stay_short(tmp_path: Path) -> None:
    runs = [
        StoredRun(tmp_path / str(number), status, "x\n" + "y" * 500, {"verifier": {"name": str(number % 40)}})
        for number in range(400)
        for status in ("done", "failed")
    ]
    columns, rows = status_rows(runs)
    assert len(rows) == STATUS_ROWS + 2
    assert rows[-2][0] == "... 16 more"
    assert dict(zip(columns, rows[-1], strict=True))["failed"] == "400"
    assert sum(int(row[1]) for row in rows[:-1]) == 400
    _, unfinished = unfinished_rows(runs, tmp_path)
    assert len(unfinished) == LISTED + 1
    assert unfinished[-1][0] == "... 385 more"
    assert max(len(row[-1]) for row in unfinished) <= 90


def test_finished_runs_are_read_once(tmp_path: Path) -> None:
    finished(tmp_path / "0")
    collector = Collector(tmp_path)
    first = collector.runs()
    (tmp_path / "0/summary.json").write_text("{}")
    assert collector.runs()[0] is first[0]
    time.sleep(0.01)
    finished(tmp_path / "0", tokens_per_second=11.0)
    assert collector.runs()[0].summary["tokens_per_second"] == 11.0


def test_simulated_sweep_is_counted(tmp_path: Path) -> None:
    simulate(tmp_path / "sweep", 300)
    done = CliRunner().invoke(app, ["collect", str(tmp_path / "sweep"), "--watch", "--output", str(tmp_path / "all")])
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(tmp_path / "all.csv")
    assert len(rows) == 300
    counts = rows.status.value_counts()
    assert counts["done"] + counts["failed"] + counts["partial"] == 300
    expected = [str(counts.get(state, "-")) for state in ("done", "running", "partial", "failed", "pending")]
    assert ["all", *expected, "300"] in [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.output.splitlines()
    ]
    assert sorted(rows.seed.unique()) == list(range(13))
    assert "runs on 3 machines" in done.output


def test_nothing_to_collect_is_a_wrong_request(tmp_path: Path) -> None:
    empty = CliRunner().invoke(app, ["collect", str(tmp_path)])
    assert empty.exit_code == 2
    missing = CliRunner().invoke(app, ["collect", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2
