"""Multiruns: planning, resuming, frozen configuration, reported failures and shared baselines."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from hydra.experimental.callback import Callback
from typer.testing import CliRunner

from quasar.cli import app
from quasar.errors import RequestError
from quasar.evaluation.fidelity import Trajectory, trajectory_of
from quasar.experiment import run as run_module
from quasar.experiment.main import main
from quasar.results.baselines import Baseline, SharedBaselines, local_baseline
from quasar.results.runs import read_run
from quasar.results.store import LOCK

FAILING = "tests.sabotage.FailingDrafter"
KILLED = "tests.sabotage.KilledDrafter"
NONE = "quasar.drafters.none.NoneDrafter"


@dataclass
class Ended:
    returncode: int
    stdout: str
    stderr: str


Sweep = Callable[..., Ended]


@pytest.fixture
def sweep(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Sweep:
    """Call ``run.py -m`` with the tiny model in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)

    def start(*overrides: str) -> Ended:
        fixed = ["model=tiny", "threads=1", "data=specbench", f"data.path={prompt_file}"]
        defaults = {
            "drafter": "none",
            "verifier": "fp16",
            "evaluate.baselines": "false",
            "evaluate.fidelity": "false",
            "calibration.prompts": "2",
            "decode.max_new_tokens": "8",
        }
        for key, value in defaults.items():
            if not any(override.startswith(f"{key}=") for override in overrides):
                fixed.append(f"{key}={value}")
        monkeypatch.setattr(sys, "argv", ["run.py", "-m", *overrides, *fixed])
        capfd.readouterr()
        code = main()
        return Ended(code, *capfd.readouterr())

    return start


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def only_sweep(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "multirun/default").iterdir()
    return folder


def test_a_failed_job_is_told_and_stops_no_other(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep("hydra.sweep.dir=s", f"drafter._target_={FAILING},{NONE}")
    assert done.returncode == 1
    assert status(tmp_path / "s/0")["status"] == "failed"
    assert "Traceback" in status(tmp_path / "s/0")["error"]
    assert status(tmp_path / "s/0")["error"].rstrip().endswith("ZeroDivisionError: sabotage")
    assert status(tmp_path / "s/1")["status"] == "done"
    assert len(records(tmp_path / "s/0")) == 1
    tail = done.stdout[done.stdout.index("1 of 2 jobs done") :]
    assert "1 jobs failed" in tail
    assert "| 0   | failed |     1/3 | ZeroDivisionError: sabotage" in tail


class Ends(Callback):
    """Records that Hydra's last callback was called."""

    seen = 0

    def on_multirun_end(self, config: object, **_: object) -> None:
        Ends.seen += 1


@pytest.mark.parametrize("target", [FAILING, NONE])
def test_hydras_last_callback_comes_once(sweep: Sweep, target: str) -> None:
    Ends.seen = 0
    sweep("hydra.sweep.dir=s", f"drafter._target_={target}", "+hydra.callbacks.ends._target_=tests.test_sweep.Ends")
    from tests.test_sweep import Ends as Instantiated

    assert Instantiated.seen == 1


def test_wrong_values_are_told_before_any_job(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep("hydra.sweep.dir=s", "decode.temperature=0.5", "decode.top_k=1,0")
    assert done.returncode == 2
    assert "error: decode.top_k=0: must be at least 1, or null (all tokens)" in done.stderr
    assert "(in the job " in done.stderr
    assert not (tmp_path / "s").exists()
    unknown = sweep("hydra.sweep.dir=s", "verifier=fp16,int3")
    assert unknown.returncode == 2
    assert "verifier/int3" in unknown.stderr
    assert not (tmp_path / "s").exists()


def test_resume_takes_up_what_is_not_done(sweep: Sweep, tmp_path: Path) -> None:
    grid = [f"drafter._target_={NONE},{FAILING}", "seed=0,1"]
    assert sweep(*grid).returncode == 1
    folder = only_sweep(tmp_path)
    # Job 1 was killed after its first prompt, in the middle of a line.
    lines = (folder / "1/generations.jsonl").read_text().splitlines(keepends=True)
    (folder / "1/generations.jsonl").write_text(lines[0] + lines[1][:70])
    (folder / "1/summary.json").unlink()
    (folder / "1/status.json").write_text((folder / "1/status.json").read_text().replace('"done"', '"running"'))
    before = {file: file.read_bytes() for file in folder.glob("*/generations.jsonl")}

    listed = sweep(*grid, "resume=true", "sweep.dry_run=true")
    assert listed.returncode == 0
    assert [line.split("|")[1:4] for line in listed.stdout.splitlines() if line.startswith("| ")][1:] == [
        [" 0   ", " done     ", "            3 "],
        [" 1   ", " continue ", "            1 "],
        [" 2   ", " again    ", "            1 "],
        [" 3   ", " again    ", "            1 "],
    ]
    assert "4 jobs: 1 done already, 1 to continue, 2 failed, to run again" in listed.stdout
    assert {file: file.read_bytes() for file in folder.glob("*/generations.jsonl")} == before

    resumed = sweep(*grid, "resume=true")
    assert resumed.returncode == 1
    assert only_sweep(tmp_path) == folder
    assert (folder / "0/generations.jsonl").read_bytes() == before[folder / "0/generations.jsonl"]
    assert (folder / "1/generations.jsonl").read_text().splitlines(keepends=True)[0] == lines[0]
    tokens = [[turn["token_ids"] for turn in record["turns"]] for record in records(folder / "1")]
    assert tokens == [[turn["token_ids"] for turn in record["turns"]] for record in map(json.loads, lines)]
    assert status(folder / "1")["status"] == "done"
    # The sabotaged jobs continued where they had failed and decoded one more prompt.
    assert [len(records(folder / job)) for job in "23"] == [2, 2]


def test_a_new_sweep_is_not_a_resumed_one(sweep: Sweep, tmp_path: Path) -> None:
    for _ in range(2):
        assert sweep("seed=0", "hydra.sweep.dir=multirun/default/${now:%f}").returncode == 0
    assert len(list((tmp_path / "multirun/default").iterdir())) == 2
    refused = sweep("seed=0", "hydra.sweep.dir=s")
    assert refused.returncode == 0
    refused = sweep("seed=0", "hydra.sweep.dir=s", "resume=false")
    assert refused.returncode == 2
    assert "already contains a sweep; pass resume=true" in refused.stderr


def test_added_jobs_get_folders_of_their_own(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("hydra.sweep.dir=s", "seed=1").returncode == 0
    done = sweep("hydra.sweep.dir=s", "seed=0,1,2,0")
    assert "4 jobs: 1 done already, 1 identical to another job, 2 to begin" in done.stdout
    seeds = {name: read_run(tmp_path / "s" / name).config["seed"] for name in "012"}
    assert seeds == {"0": 1, "1": 0, "2": 2}
    assert not (tmp_path / "s/3").exists()


def test_other_code_runs_again(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep("hydra.sweep.dir=s").returncode == 0
    for module in ("quasar.experiment.sweep.plan", "quasar.results.store"):
        monkeypatch.setattr(f"{module}.code_version", lambda: "0123456789ab")
    kept = sweep("hydra.sweep.dir=s", "sweep.any_code=true", "sweep.dry_run=true")
    assert "1 jobs: 1 done already" in kept.stdout
    again = sweep("hydra.sweep.dir=s")
    assert "1 to begin (1 have results of other code versions" in again.stdout
    assert status(tmp_path / "s/0")["code_versions"] == ["0123456789ab"]
    (aside,) = (tmp_path / "s/.superseded").iterdir()
    assert read_run(aside).status == "done"


def test_jobs_read_the_configuration_of_their_submission(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own/decode/brief.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [greedy]\ntemperature: 0.25\n")
    run = run_module.run

    def edited(*arguments: object) -> object:
        own.write_text("defaults: [greedy]\ntemperature: 0.75\n")
        return run(*arguments)

    monkeypatch.setattr(run_module, "run", edited)
    done = sweep("--config-dir", str(tmp_path / "own"), "hydra.sweep.dir=s", "decode=brief", "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert own.read_text().endswith("0.75\n")
    assert [read_run(tmp_path / "s" / job).config["decode"]["temperature"] for job in "01"] == [0.25, 0.25]


def test_jobs_side_by_side_are_refused(sweep: Sweep, tmp_path: Path) -> None:
    for launcher in (["hydra/launcher=joblib"], ["hydra/launcher=slurm_local", "hydra.launcher.parallel=2"]):
        refused = sweep("hydra.sweep.dir=s", *launcher)
        assert refused.returncode == 2
        assert f"{launcher[0]} runs several jobs at a time on the same cores" in refused.stderr
        assert "sweep.allow_parallel=true" in refused.stderr
    missing = sweep("hydra.sweep.dir=s", "hydra/launcher=joblib", "sweep.allow_parallel=true")
    assert missing.returncode == 2
    assert "hydra/launcher=joblib" in missing.stderr
    assert "is its plugin installed?" in missing.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_killed_process_fails_its_own_job_only(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep("hydra.sweep.dir=s", "hydra/launcher=slurm_local", f"drafter._target_={KILLED},{NONE}")
    assert done.returncode == 1
    killed, other = read_run(tmp_path / "s/0"), read_run(tmp_path / "s/1")
    assert (killed.status, killed.prompts, other.status) == ("failed", 1, "done")
    assert "its process was killed" in str(killed.error)
    assert "1 of 2 jobs done" in done.stdout


def test_a_job_at_work_is_left_alone(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("hydra.sweep.dir=s", f"drafter._target_={FAILING}").returncode == 1
    file = tmp_path / "s/0/status.json"
    file.write_text(file.read_text().replace('"failed"', '"running"'))
    with FileLock(tmp_path / "s/0" / LOCK):
        before = file.read_text()
        done = sweep("hydra.sweep.dir=s", f"drafter._target_={FAILING}")
        assert "1 jobs: 1 running elsewhere" in done.stdout
        assert done.returncode == 0
        assert file.read_text() == before
        single = sweep("hydra.sweep.dir=s", "sweep.dry_run=true", f"drafter._target_={FAILING}")
        assert "running" in single.stdout


def test_baselines_are_decoded_once(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep(
        "hydra.sweep.dir=s",
        "verifier=fp16,int8",
        "drafter=none,ngram",
        "evaluate.baselines=true",
        "sweep.share_baselines=true",
    )
    assert done.returncode == 0, done.stderr
    jobs = [records(tmp_path / "s" / str(number)) for number in range(4)]
    timings = [[turn["baselines"] for record in job for turn in record["turns"]] for job in jobs]
    assert timings[0] == timings[1]
    assert timings[2] == timings[3]
    assert all(entry["ar_same"] == entry["ar_ref"] for entry in timings[0])
    assert [entry["ar_ref"] for entry in timings[2]] == [entry["ar_ref"] for entry in timings[0]]
    assert all(entry["ar_same"] != entry["ar_ref"] for entry in timings[2])
    files = sorted((tmp_path / "s/baselines").glob("*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == [4, 4]

    alone = sweep("hydra.sweep.dir=t", "verifier=fp16", "evaluate.baselines=true")
    assert alone.returncode == 0
    assert not (tmp_path / "t/baselines").exists()


def test_exactness_shares_the_autoregressive_output(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def counted(*arguments: object) -> Baseline:
        measured.append(arguments)
        return local_baseline(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("quasar.experiment.decoder.local_baseline", counted)
    done = sweep(
        "hydra.sweep.dir=s",
        "verifier=int8",
        "drafter=none,ngram,lookahead",
        "evaluate.exactness=true",
        "sweep.share_baselines=true",
    )
    assert done.returncode == 0, done.stderr
    turns = [turn for number in range(3) for record in records(tmp_path / f"s/{number}") for turn in record["turns"]]
    assert len(turns) == 3 * len(measured) == 12
    assert all("match_self" in turn["exactness"] and not turn["baselines"] for turn in turns)
    (file,) = (tmp_path / "s/baselines").glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 4


def test_the_references_answers_are_decoded_once(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    computed = []

    def counted(*arguments: object) -> Trajectory:
        computed.append(arguments[1])
        return trajectory_of(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("quasar.evaluation.fidelity.trajectory_of", counted)
    done = sweep("hydra.sweep.dir=s", "verifier=fp16,int8", "drafter=none,ngram", "evaluate.fidelity=true")
    assert done.returncode == 0, done.stderr
    answers = [
        [turn["token_ids"] for record in records(tmp_path / f"s/{n}") for turn in record["fidelity"]] for n in range(4)
    ]
    assert answers == [answers[0]] * 4
    assert len(computed) == len(answers[0]) == 4


def test_baselines_of_another_device_are_refused(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("hydra.sweep.dir=s", "sweep.share_baselines=true", "evaluate.baselines=true").returncode == 0
    for file in (tmp_path / "s/baselines").glob("*.jsonl"):
        file.write_text(file.read_text().replace('"device": "cpu', '"device": "NVIDIA H100'))
    refused = sweep("hydra.sweep.dir=s", "sweep.share_baselines=true", "evaluate.baselines=true", "drafter=ngram")
    assert refused.returncode == 2
    assert "were measured on NVIDIA H100" in refused.stderr
    assert "sweep.share_baselines=false" in refused.stderr
    assert read_run(tmp_path / "s/1").status == "failed"


def baseline(tokens: list[int]) -> Baseline:
    return Baseline(tokens, len(tokens), 1.0, "here")


def test_baselines_outlive_a_holder_of_the_lock_that_dies(tmp_path: Path) -> None:
    def shared() -> SharedBaselines:
        return SharedBaselines(tmp_path, {"verifier": "int4"}, "cpu")

    assert shared().measured("1/0", [1, 2], lambda: baseline([3])).tokens == [3]
    child = os.fork()
    if child == 0:
        shared().measured("2/0", [1, 2], lambda: time.sleep(600))  # type: ignore[arg-type,return-value]
    while not (file := next(tmp_path.glob(".*.lock"), None)) or not _held(file):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (lines,) = tmp_path.glob("*.jsonl")
    with lines.open("a") as stream:
        stream.write('{"key": "2/0 cut sho')
    assert shared().measured("2/0", [1, 2], lambda: baseline([4])).tokens == [4]
    assert shared().measured("2/0", [1, 2], lambda: baseline([5])).tokens == [4]
    assert shared().measured("2/0", [1, 3], lambda: baseline([6])).tokens == [6]
    assert len(lines.read_text().splitlines()) == 3
    with pytest.raises(RequestError, match="measured on cpu, but this job runs on cuda"):
        SharedBaselines(tmp_path, {"verifier": "int4"}, "cuda").measured("1/0", [1, 2], lambda: baseline([7]))


def _held(file: Path) -> bool:
    import fcntl

    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_sweep_collects_into_one_table(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("hydra.sweep.dir=s", "verifier=fp16,int8", f"drafter._target_={NONE},{FAILING}").returncode == 1
    collected = CliRunner().invoke(app, ["collect", str(tmp_path / "s")])
    assert collected.exit_code == 0, collected.output
    table = pd.read_parquet(tmp_path / "s/collected.parquet")
    assert list(table.run) == ["0", "1", "2", "3"]
    assert list(table.verifier) == ["fp16", "fp16", "int8", "int8"]
    assert list(table.status) == ["done", "failed"] * 2
    assert list(table.prompts_done) == [3, 1, 3, 1]
    assert list(table["verifier.method"].isna()) == [True, True, False, False]
