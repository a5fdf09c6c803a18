"""W&B: it contains the same as the files of a run, and its failures do not affect the run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner
from wandb.proto import wandb_internal_pb2

from quasar.cli import app
from quasar.config.schema import CONF
from quasar.experiment.main import main
from quasar.results.collect import all_runs, tabulate
from quasar.results.runs import read_config
from quasar.results.wandb import live
from quasar.results.wandb.target import key_is_configured
from tests.compose import composed

KEY = "0123456789abcdef" * 2 + "01234567"
LEVELDB_BLOCK = 32768
Run = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use no key of the user, and only the test's server."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DATA", "CACHE", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def run(tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)

    def start(*overrides: str) -> tuple[int, str]:
        fixed = ["model=tiny", "threads=1", "data=specbench", f"data.path={prompt_file}", "decode.max_new_tokens=16"]
        grid = ["drafter=ngram", "verifier=fp16", "evaluate.baselines=false", "evaluate.fidelity=false"]
        # Hydra takes options ahead of overrides only.
        monkeypatch.setattr(sys, "argv", ["run.py", *overrides, *fixed, *grid])
        capfd.readouterr()
        code = main()
        return code, capfd.readouterr().out

    return start


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that push runs. They end with the test."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = popen(*arguments, **options)
        if "quasar.results.wandb.process" in arguments[0]:
            started.append(process)
        return process

    monkeypatch.setattr(live.subprocess, "Popen", noted)
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def read_back(folder: Path) -> tuple[dict, list[dict], dict, wandb_internal_pb2.RunRecord]:
    """Config, history, summary and header of the only offline run in a folder, by wandb's own record types."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    config: dict = {}
    summary: dict = {}
    history: list[dict] = []
    header = wandb_internal_pb2.RunRecord()
    for record in whole_run(file):
        if record.HasField("run"):
            header = record.run
            updates = record.run.config.update
        else:
            updates = record.config.update
        config.update({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates})
        if record.HasField("history"):
            history.append(nested(record.history.item))
        if record.HasField("summary"):
            summary.update(nested(record.summary.update))
    return config, history, summary, header


def whole_run(file: Path) -> list[wandb_internal_pb2.Record]:
    """A run's records. wandb's service writes the last of them a moment after the run is finished."""
    for _ in range(600):
        records = [wandb_internal_pb2.Record.FromString(content) for content in leveldb_records(file.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{file} does not end")


def nested(items: Any) -> dict:
    """wandb keeps an object's parts apart, each under its path of keys."""
    found: dict = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        inner = found
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format, in which wandb keeps a run: a header of 7 bytes, then blocks of 32 KiB."""
    assert data[:4] in (b":W&B", b"")
    position, parts = 7, []
    while position + 7 <= len(data):
        room = LEVELDB_BLOCK - position % LEVELDB_BLOCK
        if room < 7:
            position += room
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):
            return  # still being written
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_the_offline_run_holds_what_the_files_hold(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    code, output = run(
        "logger=wandb", "logger.mode=offline", "logger.wait=60", "logger.tags=[night]", "hydra.run.dir=o"
    )
    assert code == 0
    folder = tmp_path / "o"
    (offline,) = folder.glob("wandb/offline-run-*")
    assert f"W&B: offline; upload with: wandb sync {offline}" in output

    config, history, summary, header = read_back(folder)
    own = read_config(folder / "config.yaml")
    assert own is not None
    assert {key: config[key] for key in own} == own
    assert set(header.tags) == {"night", "tiny", "ngram", "fp16", "specbench"}
    assert (header.project, header.job_type) == ("quasar", "run")

    expected = json.loads((folder / "summary.json").read_text())
    assert {key: summary[key] for key in expected} == expected
    assert not [key for key in summary if key.startswith(("prompt/", "so_far/"))]

    records = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    prompts = [entry for entry in history if "prompt/acceptance_length" in entry]
    assert len(prompts) == len(records) == 3
    for record, entry in zip(records, prompts, strict=True):
        emitted = [value for turn in record["turns"] for value in turn["steps"]["emitted"]]
        assert entry["prompt/acceptance_length"] == pytest.approx(sum(emitted) / len(emitted))
        for name in ("accepted", "drafted"):
            counts = Counter(value for turn in record["turns"] for value in turn["steps"][name])
            histogram = entry[f"steps/{name}"]
            assert histogram["_type"] == "histogram"
            assert histogram["bins"] == [edge - 0.5 for edge in range(max(counts) + 2)]
            assert histogram["values"] == [counts[value] for value in range(max(counts) + 1)]
        for name in ("verify_ms", "draft_ms"):
            assert sum(entry[f"steps/{name}"]["values"]) == len(emitted)
    assert prompts[-1]["so_far/acceptance_length"] == pytest.approx(expected["mean_acceptance_length"])
    assert prompts[-1]["so_far/tokens_per_second"] == pytest.approx(expected["tokens_per_second"])
    (table,) = offline.glob("files/media/table/*.json")
    texts = [row[3] for row in json.loads(table.read_text())["data"]]
    assert texts == [turn["text"] for record in records for turn in record["turns"]]

    for file in folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_pushing_again_makes_the_same_runs(run: Run, tmp_path: Path) -> None:
    assert run("-m", "seed=0,1", "hydra.sweep.dir=s")[0] == 0
    pushed = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["wandb", "push", str(tmp_path / "s"), "--mode", "offline", "--project", "mine"])
        assert done.exit_code == 0, done.output
        assert "2 of 2 runs pushed, offline" in done.output
        pushed.append([read_back(tmp_path / "s" / job) for job in "01"])
    for before, after in zip(*pushed, strict=True):
        assert before[3].run_id == after[3].run_id
        assert [entry.get("prompt/acceptance_length") for entry in before[1]] == [
            entry.get("prompt/acceptance_length") for entry in after[1]
        ]
        assert (after[3].run_group, after[3].job_type, after[3].project) == ("s", "sweep", "mine")
    first, second = pushed[1]
    # Consecutive runs of one process are separate.
    assert first[3].run_id != second[3].run_id
    assert [first[0]["seed"], second[0]["seed"]] == [0, 1]
    assert len(first[1]) == len(second[1]) == 4


def test_a_sweep_has_a_summary_with_its_table_and_figures(run: Run, tmp_path: Path) -> None:
    options = ("evaluate.fidelity=true", "evaluate.baselines=true", "evaluate.noise_floor=false")
    assert run("-m", *options, "decode.draft_tokens=1,2", "hydra.sweep.dir=s")[0] == 0
    assert run("-m", *options, "decode.draft_tokens=1", "hydra.sweep.dir=deeper/s")[0] == 0
    identities = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["wandb", "push", str(tmp_path), "--mode", "offline"])
        assert done.exit_code == 0, done.output
        assert "2 of 2 summaries of sweeps pushed, offline" in done.output
        identities.append([read_back(tmp_path / sweep)[3].run_id for sweep in ("s", "deeper/s")])
    assert identities[0] == identities[1]
    assert identities[0][0] != identities[0][1], "two sweeps of the same name share an id"

    _, history, summary, header = read_back(tmp_path / "s")
    assert (header.run_group, header.job_type) == ("s", "summary")
    assert summary["states"] == {"done": 2}
    assert "no_figures" not in summary
    assert "3 prompts" in summary["provenance"]
    (files,) = (tmp_path / "s").glob("wandb/offline-run-*/files")
    (logged,) = [entry for entry in history if "runs" in entry]
    content = json.loads((files / logged["runs"]["path"]).read_text())
    expected = tabulate(all_runs(tmp_path / "s"), tmp_path / "s")
    assert content["columns"] == list(expected.columns)
    place = content["columns"].index("mean_acceptance_length")
    assert [row[place] for row in content["data"]] == list(expected["mean_acceptance_length"])
    images = [value for key, value in logged.items() if key.startswith("figures/")]
    assert images
    for image in images:
        assert (files / image["path"]).read_bytes().startswith(b"\x89PNG")


def test_a_summary_of_unfinished_runs_says_why_it_has_no_figures(run: Run, tmp_path: Path) -> None:
    assert run("-m", "decode.draft_tokens=1,2", "hydra.sweep.dir=s")[0] == 0
    status = tmp_path / "s/1/status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"status": "failed", "error": "out of memory"}))
    (tmp_path / "s/1/summary.json").unlink()
    done = CliRunner().invoke(app, ["wandb", "push", str(tmp_path / "s"), "--mode", "offline"])
    assert "1 of 1 summaries of sweeps pushed, offline" in done.output
    summary = read_back(tmp_path / "s")[2]
    assert summary["states"] == {"done": 1, "failed": 1}
    assert "failed" in str(summary["no_figures"])


def test_a_server_that_never_answers_holds_no_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        # If the run waited for it, the test would exceed its time limit.
        code, output = run("logger=wandb", "logger.wait=3600", "hydra.run.dir=o")
        assert code == 0
        assert (tmp_path / "o/summary.json").exists()
        assert "W&B: still uploading in the background; quasar wandb push" in output
        assert processes[0].poll() is None


@pytest.mark.slow
def test_out_of_reach_it_falls_back_to_offline(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    code, output = run("logger=wandb", "logger.wait=3600", "hydra.run.dir=o")
    assert code == 0
    assert "W&B: still uploading in the background; quasar wandb push" in output
    assert processes[0].wait(timeout=120) == 0
    outcome = json.loads((tmp_path / "o/wandb/outcome.json").read_text())
    assert (outcome["mode"], outcome["ended"]) == ("offline", True)
    assert len(read_back(tmp_path / "o")[1]) == 4


def test_a_missing_package_is_a_warning(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    code, output = run("logger=wandb", "hydra.run.dir=o")
    assert code == 0
    assert "warning: logger=wandb: the package wandb is not installed" in output
    assert not (tmp_path / "o/wandb").exists()


def test_a_file_in_the_way_of_wandb_is_a_warning(run: Run, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/wandb").write_text("in the way")
    code, output = run("logger=wandb", "hydra.run.dir=o")
    assert code == 0
    assert "warning: logger=wandb: [Errno 20] Not a directory" in output
    assert "quasar wandb push can log the run later" in output
    assert json.loads((tmp_path / "o/status.json").read_text())["status"] == "done"


def test_a_disk_that_is_full_for_wandb_is_a_remark(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "o/wandb"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        (disk / "filler").write_bytes(bytes(4096))
        code, output = run("logger=wandb", "logger.mode=offline", "logger.wait=60", "hydra.run.dir=o")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert code == 0
    assert "W&B: the logging process crashed; quasar wandb push" in output
    assert json.loads((tmp_path / "o/status.json").read_text())["status"] == "done"
    assert json.loads((tmp_path / "o/summary.json").read_text())["prompts"] == 3


def test_a_refused_run_leaves_nothing(run: Run, tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    assert run("logger=wandb", "hydra.run.dir=o", "drafter.num_tokens=0")[0] == 2
    assert not list(tmp_path.glob("o/*"))
    # A wrong value is found before the logging process would start.
    assert not processes


def test_a_refused_second_attempt_leaves_the_first(
    run: Run, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    assert run("hydra.run.dir=o")[0] == 0
    assert run("logger=wandb", "hydra.run.dir=o", "seed=1")[0] == 2
    assert processes[0].poll() == -9
    assert not (tmp_path / "o/wandb").exists()


def test_wandb_turned_off_by_its_own_variable_is_off(
    run: Run, monkeypatch: pytest.MonkeyPatch, processes: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run("logger=wandb", "hydra.run.dir=o")[0] == 0
    assert not processes


def test_where_a_key_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not key_is_configured()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert key_is_configured()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not key_is_configured()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert key_is_configured()


def test_the_sweep_file_drives_the_entry_point() -> None:
    sweep = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
    assert (sweep["program"], sweep["method"]) == ("run.py", "bayes")
    fixed = [word for word in sweep["command"] if "=" in word]
    for key, values in sweep["parameters"].items():
        for value in values.get("values", [values.get("min"), values.get("max")]):
            config = composed(*fixed, f"{key}={value}")
            assert config.logger.name == "wandb"
    assert sweep["metric"]["name"] == "speedup_vs_ar_ref"
