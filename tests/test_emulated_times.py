"""Nothing that compares runs computes a speedup from the times of an emulated number format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from quasar.results.measured import Measured
from quasar.results.metrics import compute, summary_of
from quasar.results.pass_rows import pass_rows_of_runs
from quasar.results.quantities import QUANTITIES, estimates
from quasar.results.rows import TIMES_OF_VERIFIER, rows_of_runs
from quasar.results.runs import StoredRun, read_run
from quasar.results.schema import Baselines, ForcedAnswer, PassRecord, PromptRecord, Timing
from quasar.results.slowness import mean_step
from quasar.results.store import RunFolder
from quasar.results.tables import document, emulated_arms
from tests.compose import composed
from tests.records import environment, facts, turn
from tests.synthetic import synthetic_provenance
from tests.test_show_and_compare import cells, quasar

TIMED = {
    *("reference_text_speedup", "reference_text_speedup_by_family", "reference_text_speedup_geometric"),
    *("speedup_vs_ar_ref", "speedup_vs_ar_ref_by_family", "speedup_vs_ar_same"),
    *("quantization_alone", "interaction", "cheaper_step"),
    *("break_even_acceptance_length", "draft_ms", "verify_ms", "overhead_ms", "step_ms", "tokens_per_second"),
}
"""The quantities that are computed from the times of the verifier."""


def stored(folder: Path, verifier: str, emulated: bool) -> StoredRun:
    """Write a finished run of two prompts with every measurement, and read it."""
    answer = ForcedAnswer([1, 2, 3], [2], [0.1, 0.2], [True, False], [0.0, 0.0], [True, True], 5.0, 8.0, 10.0)
    both = Baselines(ar_same=Timing(5, 8.0, "here"), ar_ref=Timing(5, 10.0, "here"))
    records = [
        PromptRecord(question, "math", [turn([2, 3], [1, 3], baselines=both)], fidelity=[answer])
        for question in ("1", "2")
    ]
    found = facts(verifier=verifier, emulated=emulated)
    described = replace(environment(2), header={}, warnings=[], facts=vars(found))
    run = RunFolder(folder, composed("model=tiny", f"verifier={verifier}", "drafter=ngram"), resume=True)
    run.begin(["run.py"], described)
    for record in records:
        run.append(record)
    passes = [PassRecord(rows, 8, 0, 1.0 * rows, 1.0, 1e10, 1) for rows in (1, 2)]
    (folder / "passes.jsonl").write_text("".join(json.dumps(entry.to_json()) + "\n" for entry in passes))
    run.finish(summary_of(compute(Measured(records, found, passes))))
    run._lock.release()
    return read_run(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[StoredRun]:
    return [
        stored(tmp_path / "fp16", "fp16", emulated=False),
        stored(tmp_path / "int8", "int8", emulated=False),
        stored(tmp_path / "fp8", "fp8", emulated=True),
    ]


def test_rows_of_an_emulation_have_no_times_of_the_verifier(runs: list[StoredRun]) -> None:
    rows = rows_of_runs(runs).set_index("verifier")
    assert rows.loc["fp8", "emulated"].all()
    assert rows.loc["fp8", list(TIMES_OF_VERIFIER)].isna().all(axis=None)
    assert rows.loc["int8", list(TIMES_OF_VERIFIER)].notna().all(axis=None)
    assert set(TIMES_OF_VERIFIER) == {name for name in rows if str(name).endswith("_ms") and "ar_ref" not in str(name)}
    assert rows.loc["fp8", "text_ar_ref_ms"].tolist() == [10.0, 10.0]
    assert rows.loc["fp8", "emitted"].tolist() == [6, 6]


def test_estimates_of_an_emulation_are_null_where_they_need_its_times(runs: list[StoredRun]) -> None:
    found = {group.verifier: values for group, values in estimates(rows_of_runs(runs), list(QUANTITIES))}
    unknown = {name for name, value in found["fp8"].items() if value is None}
    assert unknown - {name for name, value in found["int8"].items() if value is None} == TIMED
    assert found["fp8"]["mean_acceptance_length"].value == 3  # type: ignore[union-attr]
    assert found["fp8"]["kl_to_reference"].value == pytest.approx(0.15)  # type: ignore[union-attr]


def test_tables_say_why_an_arm_has_no_times(runs: list[StoredRun]) -> None:
    rows = rows_of_runs(runs)
    text = document({"All": ["reference_text_speedup", "tokens_per_second"]}, (), rows, synthetic_provenance())
    assert "| fp8 | - | - |" in text
    assert "No times and no speedups: fp8. The machine emulates the number format" in text
    others = rows[rows["verifier"] != "fp8"]
    assert "emulates" not in document({"All": ["tokens_per_second"]}, (), others, synthetic_provenance())
    assert emulated_arms(others.drop(columns="emulated")) == []


def test_passes_of_an_emulation_are_left_out(runs: list[StoredRun]) -> None:
    passes = pass_rows_of_runs(runs)
    assert passes is not None
    assert set(passes["verifier"]) == {"fp16", "int8"}
    assert pass_rows_of_runs(runs[2:]) is None


def test_an_emulation_is_not_called_slower() -> None:
    both = Baselines(ar_same=Timing(5, 8.0, "here"), ar_ref=Timing(5, 10.0, "here"))
    records = [PromptRecord("1", "math", [turn([2, 3], [1, 3], baselines=both)])]
    assert mean_step(Measured(records, facts())) is not None
    assert mean_step(Measured(records, facts(emulated=True))) is None


def test_collected_runs_have_no_speedup_and_the_reason(runs: list[StoredRun], tmp_path: Path) -> None:
    code, output = quasar("collect", tmp_path)
    assert code == 0, output
    assert "no speedups: fp8 (the machine emulates the verifier's number format)" in output
    table = pd.read_csv(next(tmp_path.glob("*.csv"))).set_index("verifier")
    # The memory-bound speedup is made of bytes and acceptance, not of times.
    speeds = [name for name in table if "speedup" in name and name != "memory_bound_speedup"]
    assert len(speeds) >= 6
    assert table.loc["fp8", speeds].isna().all()
    assert table.loc["int8", "speedup_vs_ar_ref"] > 0
    assert table["emulated"].to_dict() == {"fp16": False, "int8": False, "fp8": True}


def test_a_comparison_has_no_times_of_an_emulation(runs: list[StoredRun]) -> None:
    code, output = quasar("compare", runs[0].folder, runs[2].folder)
    assert code == 0, output
    assert cells(output, "τ")[1:3] == ["3.00", "3.00"]
    assert not any(f"| {name} " in output for name in ("tokens/s", "ms per token", "step ms", "verify ms"))
    assert "fp8 emulates its number format: its times are no speedup and are not compared" in output
    code, output = quasar("compare", runs[0].folder, runs[1].folder)
    assert "| tokens/s " in output
    assert "emulates" not in output
