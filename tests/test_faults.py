"""Sweeps under SIGKILL and on full disks: only the prompt in flight is lost, and a resumed sweep ends the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quasar.experiment.main import main
from quasar.results import environment
from quasar.results.collect import Collector, tabulate
from quasar.results.runs import read_run
from tests.in_process import disk_full_after
from tests.selection import fast

PROMPTS = 10
TIMINGS = ("_ms", "per_second", "speedup", "bandwidth", "peak_memory", "disturbed")
fresh = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """One process imports everything; those that are killed are forked from it."""
    fresh.set_forkserver_preload(["quasar.experiment.run", "quasar.experiment.sweep.job", "tests.test_faults"])
    first = fresh.Process(target=int)
    first.start()
    first.join()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    turns = [f"number {number} and number {number} and" for number in range(PROMPTS)]
    lines = [{"question_id": number, "category": "chat", "turns": [turn]} for number, turn in enumerate(turns)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def attempt(prompts: Path, folder: Path) -> int:
    """A sweep of two jobs with shared baselines; what is done in ``folder`` is not done again."""
    torch.set_num_threads(1)
    environment.copy_bandwidth = lambda _: 1e10  # type: ignore[assignment]
    grid = ["drafter=ngram,none", "verifier=fp16", "verifier.dtype=float32"]
    fixed = ["model=tiny", "threads=1", "data=specbench", f"data.path={prompts}"]
    fixed += ["decode.max_new_tokens=12", "decode.draft_tokens=5"]
    sys.argv = ["run.py", "-m", *grid, *fixed, f"hydra.sweep.dir={folder}"]
    return main()


def silently(prompts: Path, folder: Path) -> None:
    """`attempt` in a separate process, which does not use the terminal."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    sys.exit(attempt(prompts, folder))


def whole_lines(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("*/generations.jsonl"))


def results(folder: Path) -> list[Any]:
    """What two sweeps with equal results share: all but timings."""
    found: list[Any] = []
    for job in ("0", "1"):
        run = read_run(folder / job)
        assert run.status == "done", run.error
        found.append({key: value for key, value in run.summary.items() if not any(part in key for part in TIMINGS)})
        lines = [json.loads(line) for line in (folder / job / "generations.jsonl").read_text().splitlines()]
        found.append([(line["question_id"], [turn["token_ids"] for turn in line["turns"]]) for line in lines])
    return found


def readable(folder: Path) -> None:
    """Whatever state it was left in, the sweep collects."""
    if folder.exists():
        tabulate(Collector(folder).runs(), folder)


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_random_it_ends_the_same(prompts: Path, tmp_path: Path, kills: int) -> None:
    undisturbed = fresh.Process(target=silently, args=(prompts, tmp_path / "whole"))
    started = time.monotonic()
    undisturbed.start()
    undisturbed.join()
    duration = time.monotonic() - started
    assert undisturbed.exitcode == 0
    dice = random.Random(kills)
    hit = lines = sweeps = 0
    while hit < kills:
        folder = tmp_path / str(sweeps)
        process = fresh.Process(target=silently, args=(prompts, folder))
        process.start()
        process.join(timeout=dice.uniform(0.1, 0.9) * duration)
        hit += process.is_alive()
        process.kill()
        process.join()
        readable(folder)
        before, lines = lines, whole_lines(folder)
        assert lines >= before, "a finished prompt was lost"
        if lines == 2 * PROMPTS or hit == kills:
            assert attempt(prompts, folder) == 0
            assert results(folder) == results(tmp_path / "whole")
            assert not list(folder.glob("*/.*.partial"))
            sweeps, lines = sweeps + 1, 0


@pytest.mark.parametrize("writes", fast([0, 4, 9], 4))
def test_full_disk_loses_no_finished_prompt(prompts: Path, tmp_path: Path, writes: int) -> None:
    """From the n-th write to disk on there is no room for another."""
    with disk_full_after(writes):
        assert attempt(prompts, tmp_path / "s") == 1
    readable(tmp_path / "s")
    lines = whole_lines(tmp_path / "s")
    for file in (tmp_path / "s").glob("*/generations.jsonl"):
        assert file.read_bytes().endswith(b"\n") or not file.read_bytes()
    assert not list((tmp_path / "s").rglob("*.partial"))
    assert attempt(prompts, tmp_path / "s") == 0
    assert lines <= whole_lines(tmp_path / "s") == 2 * PROMPTS
    for job in "01":
        assert read_run(tmp_path / "s" / job).summary["prompts"] == PROMPTS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(prompts: Path, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(16 * 1024))
    assert attempt(prompts, small_disk / "s") == 1
    readable(small_disk / "s")
    finished = whole_lines(small_disk / "s")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert attempt(prompts, small_disk / "s") == 0
    assert attempt(prompts, tmp_path / "whole") == 0
    assert finished < 2 * PROMPTS
    assert results(small_disk / "s") == results(tmp_path / "whole")
