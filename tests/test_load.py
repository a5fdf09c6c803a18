"""The load of the machine: recorded counters of Linux, a real busy process, and what a disturbed run says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quasar import SPINS
from quasar.results import load
from quasar.results.console import Reporter
from quasar.results.load import DISTURBED, between, parsed, sample, worst_of
from quasar.results.measured import Measured
from quasar.results.metrics import compute
from quasar.results.overview import remarks
from quasar.results.report import print_results
from quasar.results.runs import StoredRun
from quasar.results.schema import PromptRecord
from quasar.results.store import RunFolder
from tests.compose import composed
from tests.records import environment, facts, turn

BEFORE = """cpu  300000 2000 50000 9000000 1000 300 200 40 500 0
cpu0 100000 500 20000 3000000 400 100 50 10 200 0
cpu1 100000 500 20000 3000000 400 100 50 10 200 0
cpu10 100000 1000 10000 3000000 200 100 100 20 100 0
intr 12345 0 0
ctxt 99
"""
AFTER = """cpu  301900 2040 50320 9000600 1010 310 210 90 500 0
cpu0 100800 520 20100 3000070 402 104 54 30 200 0
cpu1 100700 510 20200 3000080 404 103 53 30 200 0
cpu10 100400 1010 10020 3000450 204 103 103 30 100 0
intr 12999 0 0
ctxt 199
"""


def samples(own: float, seconds: float = 10.0) -> tuple[load.Sample, load.Sample]:
    return (
        parsed(BEFORE, "0.50 0.40 0.30 1/200 4242\n", (0, 1), 100.0, 1000.0),
        parsed(AFTER, "3.25 0.90 0.40 4/200 4299\n", (0, 1), 100.0 + own, 1000.0 + seconds),
    )


@pytest.fixture(autouse=True)
def hundredths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.results.load.os.sysconf", lambda name: {"SC_CLK_TCK": 100}[name])


def test_recorded_counters_over_the_cores_of_the_process() -> None:
    begin, end = samples(own=11.0)
    # cpu0: 800 user, 20 nice, 100 system, 4 irq, 4 softirq; cpu1: 700, 10, 200, 3, 3. Other cores do not count.
    assert end.busy - begin.busy == pytest.approx((928 + 916) / 100)
    assert end.steal - begin.steal == pytest.approx(0.40)
    found = between(begin, end, cores=2)
    assert found is not None
    assert found.other_cpu_share == pytest.approx((18.44 - 11.0) / 20)
    assert found.steal_share == pytest.approx(0.40 / 20)
    assert (found.seconds, found.cores, found.load_average) == (10.0, 2, (0.5, 3.25))


def test_a_process_alone_is_not_disturbed_and_a_short_one_not_judged() -> None:
    alone = between(*samples(own=18.4), cores=2)
    assert alone is not None
    assert alone.other_cpu_share == pytest.approx(0.04 / 20)
    assert alone.other_cpu_share < DISTURBED
    negative = between(*samples(own=19.0), cores=2)
    assert negative is not None
    assert negative.other_cpu_share == 0.0, "the counters are not exact"
    assert between(*samples(own=1.0, seconds=1.9), cores=2) is None
    assert between(None, None, cores=2) is None


def test_the_worst_attempt_counts_and_one_that_was_killed_does_not() -> None:
    assert worst_of([{"attempt": 1}, {"attempt": 2, "load": None}]) is None
    attempts = [
        {"load": {"other_cpu_share": 0.01, "steal_share": 0.2}},
        {"load": {"other_cpu_share": 0.03, "steal_share": 0.0}},
        {},
    ]
    assert worst_of(attempts) == 0.2


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_a_real_busy_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        begin = sample()
        time.sleep(2.5)
        found = between(begin, sample(), cores=1)
    finally:
        busy.kill()
        busy.wait()
    assert found is not None
    assert found.other_cpu_share > 0.5, "this process slept, so that others took the core"
    assert begin is not None
    assert begin.own < 1e6


def test_an_attempts_load_is_in_environment_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = iter(samples(own=11.0))
    monkeypatch.setattr("quasar.results.store.sample", lambda: next(recorded))
    run = RunFolder(tmp_path, composed("model=tiny"), resume=True)
    run.begin(["run.py"], environment(prompts=1))
    with pytest.raises(KeyError), run.load_recorded(cores=2):
        raise KeyError("a failed run")
    (attempt,) = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert attempt["load"] == {
        "seconds": 10.0,
        "cores": 2,
        "other_cpu_share": 0.372,
        "steal_share": 0.02,
        "load_average": [0.5, 3.25],
    }
    assert run.attempts() == [attempt]


@pytest.mark.parametrize(("share", "disturbed"), [(None, None), (DISTURBED, False), (0.37, True)])
def test_a_disturbed_run_says_so(
    share: float | None, disturbed: bool | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = Measured([PromptRecord("1", "math", [turn([4], [2])])], facts(other_cpu_share=share))
    values = compute(run)
    assert values["disturbed"] is disturbed
    print_results(Reporter(), run, values)
    assert ("disturbed: other processes took 37% of the cores" in capsys.readouterr().out) is bool(disturbed)
    collected = StoredRun(tmp_path, "done", summary={"disturbed": disturbed})
    assert len(remarks([collected])) == int(bool(disturbed))


@pytest.mark.parametrize(
    ("chosen", "expected"), [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_sleep_soon_unless_the_user_chooses(chosen: dict[str, str], expected: str | None) -> None:
    free = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import quasar, os, sys; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=free | chosen, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", str(expected)]
