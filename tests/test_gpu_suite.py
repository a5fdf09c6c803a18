"""The GPU suite's own logic; what it measures needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from quasar.results.schema import PromptRecord
from scripts.gpu_suite import bars, simulation, workers
from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import DIED, Recorder
from tests.records import turn

BLOCKED = [
    "accelerate",
    "bitsandbytes",
    "gguf",
    "hydra",
    "omegaconf",
    "pandas",
    "platformdirs",
    "pyarrow",
    "pydantic",
    "rich",
    "scipy",
    "torch_pruning",
    "typer",
    "wandb",
]

IMPORT_ALL = f"""
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import scripts.gpu_suite
for module in pkgutil.iter_modules(scripts.gpu_suite.__path__):
    if module.name != "__main__":
        importlib.import_module(f"scripts.gpu_suite.{{module.name}}")
"""


def test_suite_needs_no_package_of_the_project_but_the_common_ones() -> None:
    """A machine rented for its GPU has torch, triton and transformers, and nothing else of ours."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_failing_section_loses_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(tmp_path, seconds=100)

    def fails() -> None:
        recorder.keep("second", [1, 2])
        raise ValueError("no such instruction")

    recorder.run("first", lambda: {"value": 1})
    recorder.run("second", fails)
    recorder.run("third", lambda: 3)
    assert recorder.finish() == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["first"], results["second"], results["third"]) == ({"value": 1}, [1, 2], 3)
    assert results["sections"]["first"]["error"] is None
    assert "no such instruction" in results["sections"]["second"]["error"]
    assert "1 sections failed" in capsys.readouterr().out


def test_sections_after_the_time_are_left_out_but_for_the_closing_ones(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, seconds=0)
    recorder.run("passes", lambda: 1)
    recorder.run("bars", lambda: 2)
    assert "passes" not in recorder.results
    assert recorder.results["bars"] == 2
    assert recorder.finish() == 1


def test_wrong_kernels_fail_the_suite(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, seconds=100)
    recorder.run("correctness", lambda: {"cases": [{"op": "linear_w8a8", "correct": False}]})
    assert recorder.finish() == 1


def test_bars_take_the_worst_shape() -> None:
    def product(contender: str, layer: str, rows: int, microseconds: float) -> dict[str, object]:
        row = {"model": "Qwen3-8B", "layer": layer, "rows": rows, "contender": contender, "microseconds": microseconds}
        return row | {"bytes_per_second": 2e12}

    products = [product("cublas_bf16", "down", rows, 40.0) for rows in (1, 16)]
    products += [product("linear_w8a8", "down", 1, 20.0), product("linear_w8a8", "down", 16, 25.0)]
    passes = [
        {
            "model": "Qwen3-8B",
            "weights": weights,
            "rows": 6,
            "context": 2048,
            "milliseconds": ms,
            "bytes_per_second": 2.5e12,
        }
        for weights, ms in (("bf16", 6.0), ("int8", 3.0))
    ]
    overhead = [{"model": "Qwen3-8B", "weights": "int8", "overhead_share": 0.02}]
    environment = {"copy_bandwidth_bytes_per_second": 2.5e12}
    results = {"products": products, "passes": passes, "overhead": overhead, "environment": environment}
    found = {bar["name"].split(",")[0]: bar for bar in bars.measure(results)}
    ratio = found["linear_w8a8 over cuBLAS BF16"]
    assert (ratio["value"], ratio["place"], ratio["met"]) == (40 / 25, "down M=16", False)
    share = found["linear_w8a8 share of copy bandwidth"]
    # Good as far as it was measured: two of twelve.
    assert (share["value"], share["met"], share["missing"]) == (0.8, None, 10)
    assert found["linear_w4a16 over cuBLAS BF16"]["value"] is None
    assert found["BF16 pass share of copy bandwidth"]["met"] is True
    assert found["int8 pass over our BF16 pass"]["value"] == 2.0
    assert found["int4 pass over our BF16 pass"]["met"] is None
    assert found["overhead of a step with int8 weights"]["met"] is True


def test_simulation_adds_up_the_passes_of_a_trace(tmp_path: Path) -> None:
    """One turn of two steps: 3 rows, measured as 4, at context 100; then 1 row at context 103."""
    trace = tmp_path / "generations.jsonl"
    record = PromptRecord("1", "chat", [turn([2, 0], [2, 0], prompt_tokens=100)])
    trace.write_text(json.dumps(record.to_json()) + "\n")
    passes = [
        {"weights": "int8", "rows": rows, "context": context, "milliseconds": rows + context / 100}
        for rows in (1, 4)
        for context in (0, 200)
    ]
    found = simulation.measure(Plan(torch.device("cpu"), trace=trace), passes)
    (row,) = found["rows"]
    assert found["simulated"] is True
    assert row["acceptance_length"] == 2.0
    assert row["tokens_per_second"] == pytest.approx(4e3 / ((4 + 1.00) + (1 + 1.03)))
    assert row["tokens_per_second_without_drafts"] == pytest.approx(4e3 / (3 * 2.00 + 2.03))


def fails_or_dies(job: int) -> int:
    """Work for processes of their own: 1 raises, 2 kills its process, 3 hangs."""
    if job == 1:
        raise ValueError("no such instruction")
    if job == 2:
        os._exit(7)
    if job == 3:
        time.sleep(60)
    return 10 * job


def test_a_process_that_dies_loses_its_own_job_only() -> None:
    found = list(
        workers.in_processes(
            fails_or_dies, [0, 1, 2, 4], lambda job, error: f"{job}: {error}", torch.device("cuda"), most=2
        )
    )
    assert found == [0, "1: ValueError: no such instruction", "2: its process ended with exit code 7", 40]


def test_a_process_that_hangs_is_killed() -> None:
    begin = time.monotonic()
    found = list(
        workers.in_processes(
            fails_or_dies, [0, 3, 4], lambda job, error: f"{job}: {error}", torch.device("cuda"), most=1, seconds=15
        )
    )
    assert found == [0, "3: the time was up", "4: the time was up"]
    assert time.monotonic() - begin < 40


def test_a_section_ends_when_the_time_is_up_and_keeps_what_it_has(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, seconds=1)

    def slow() -> None:
        recorder.keep("passes", [1])
        try:
            time.sleep(30)
        except Exception:  # as sections do around a measurement
            recorder.keep("passes", [2])

    recorder.run("passes", slow)
    recorder.run("bars", lambda: 3)
    assert recorder.results["passes"] == [1]
    assert "time was up" in recorder.results["sections"]["passes"]["error"]
    assert recorder.results["bars"] == 3


def test_another_process_resumes_after_the_section_in_which_one_died(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, seconds=100)
    recorder.run("first", lambda: 1)

    class KilledError(BaseException):
        pass

    def dies() -> None:
        recorder.keep("second", [2])
        raise KilledError

    with pytest.raises(KilledError):
        recorder.run("second", dies)
    resumed = Recorder(tmp_path, seconds=100, resume=True)
    for name in ("first", "second", "third"):
        resumed.run(name, lambda: "again")
    assert {name: resumed.results[name] for name in ("first", "second", "third")} == {
        "first": 1,
        "second": [2],
        "third": "again",
    }
    assert resumed.results["sections"]["second"]["error"] == DIED
    assert resumed.results["begin"] == recorder.results["begin"]  # its time goes on
    assert resumed.finish() == 1
