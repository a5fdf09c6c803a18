"""Sweeps on a real SLURM of one node; ``make test-slurm`` starts it. A test's jobs take seconds of imports each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from quasar.cli import app
from quasar.results.runs import StoredRun, read_run

ROOT = Path(__file__).parents[2]
PROMPTS = 50
GRID = ["verifier=fp16,int8", "drafter=none,ngram"]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Enough to decode that a job can be met at work."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"question_id": n, "category": "chat", "turns": [f"one two {n} one two"]} for n in range(PROMPTS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def start(tmp_path: Path, prompts: Path, *overrides: str) -> subprocess.Popen[str]:
    fixed = ["model=tiny", "threads=1", "data=specbench", f"data.path={prompts}", "decode.max_new_tokens=24"]
    fixed.append("calibration.prompts=2")
    launcher = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.sweep.dir=s"]
    # Options come before overrides.
    command = [sys.executable, str(ROOT / "run.py"), "-m", *overrides, *launcher, *fixed]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_prompts(folder: Path, prompts: int) -> StoredRun:
    deadline = time.monotonic() + 180
    while (run := read_run(folder)).prompts < prompts:
        assert run.status != "failed", run.error
        assert time.monotonic() < deadline, f"{folder} did not come to its prompt {prompts}"
        time.sleep(0.05)
    return run


def send(folder: Path, number: signal.Signals) -> None:
    """To the process at work in a folder, as the kernel does where memory runs out. scancel may come after its end."""
    os.kill(json.loads((folder / "status.json").read_text())["pid"], number)


def job_of(tmp_path: Path, folder: str) -> str:
    """SLURM's name of the job that works in a folder: jobs and folders of a fresh sweep have the same order."""
    names = sorted(path.name for path in (tmp_path / "s/.submitit").iterdir() if path.is_dir())
    return next((name for name in names if name.endswith(f"_{folder}")), names[0])


def start_now(job: str) -> None:
    """SLURM holds a requeued job back for two minutes."""
    asked = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    while subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() != "PENDING":
        time.sleep(0.2)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


def test_a_killed_job_is_told_resumed_and_collected(tmp_path: Path, prompts: Path) -> None:
    sweep = start(tmp_path, prompts, *GRID, "sweep.share_baselines=true")
    wait_for_prompts(tmp_path / "s/0", 2)
    send(tmp_path / "s/0", signal.SIGKILL)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 1, output
    assert "3 of 4 jobs done" in output
    killed = read_run(tmp_path / "s/0")
    assert killed.status == "failed"
    assert "the job ended without a result: SLURM job" in str(killed.error)
    assert 2 <= killed.prompts < PROMPTS
    first = (tmp_path / "s/0/generations.jsonl").read_bytes()
    others = [(tmp_path / f"s/{job}/generations.jsonl").stat().st_mtime_ns for job in "123"]

    resumed = start(tmp_path, prompts, *GRID, "sweep.share_baselines=true", "resume=true")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert "4 jobs: 3 done already, 1 failed, to run again" in output
    assert "submitted 1 jobs" in output
    assert (tmp_path / "s/0/generations.jsonl").read_bytes().startswith(first)
    assert [(tmp_path / f"s/{job}/generations.jsonl").stat().st_mtime_ns for job in "123"] == others

    collected = CliRunner().invoke(app, ["collect", str(tmp_path / "s")])
    assert collected.exit_code == 0, collected.output
    table = pd.read_parquet(tmp_path / "s/collected.parquet")
    assert list(table.status) == ["done"] * 4
    assert list(table.prompts) == [PROMPTS] * 4
    assert list(zip(table.verifier, table.drafter, strict=True)) == [
        ("fp16", "none"),
        ("fp16", "ngram"),
        ("int8", "none"),
        ("int8", "ngram"),
    ]
    for measured in ("tokens_per_second", "speedup_vs_ar_same", "mean_acceptance_length_ref"):
        assert (table[measured] > 0).all()
    assert [len(file.read_text().splitlines()) for file in (tmp_path / "s/baselines").glob("*.jsonl")] == [
        PROMPTS,
        PROMPTS,
    ]


def test_a_preempted_job_is_queued_again_and_continues(tmp_path: Path, prompts: Path) -> None:
    sweep = start(
        tmp_path, prompts, "verifier=fp16", "drafter=ngram", "evaluate.baselines=false", "evaluate.fidelity=false"
    )
    before = wait_for_prompts(tmp_path / "s/0", 2)
    # What submitit asks SLURM to send ahead of a preemption or the time limit.
    send(tmp_path / "s/0", signal.SIGUSR2)
    start_now(job_of(tmp_path, "0"))
    output, _ = sweep.communicate(timeout=360)
    assert sweep.returncode == 0, output
    log = "".join(file.read_text() for file in (tmp_path / "s/.submitit").glob("*/*.err"))
    log += "".join(file.read_text() for file in (tmp_path / "s/.submitit").glob("*/*.out"))
    assert "Requeued job" in log or "preempted" in log
    assert " already done" in log
    run = read_run(tmp_path / "s/0")
    assert (run.status, run.prompts) == ("done", PROMPTS)
    assert before.prompts < PROMPTS


def test_jobs_read_the_configuration_of_their_submission(tmp_path: Path, prompts: Path) -> None:
    own = tmp_path / "own/decode/warm.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [greedy]\ntemperature: 0.25\n")
    overrides = ["decode=warm", "verifier=fp16", "drafter=none", "seed=0,1", "data.limit=2"]
    overrides += ["evaluate.baselines=false", "evaluate.fidelity=false"]
    sweep = start(
        tmp_path, prompts, "--config-dir", str(tmp_path / "own"), "hydra.launcher.array_parallelism=1", *overrides
    )
    while not (tmp_path / "s/.submitit").exists():
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.02)
    own.write_text("defaults: [greedy]\ntemperature: 0.75\n")
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, output
    assert [read_run(tmp_path / "s" / job).config["decode"]["temperature"] for job in "01"] == [0.25, 0.25]
