"""Rows, estimates with their intervals, and the origin of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from quasar.errors import RequestError
from quasar.results.estimates import groups, partner_rows
from quasar.results.intervals import estimate, geometric_mean, holm, mean_over_families, ratio_of_totals
from quasar.results.labels import arm_names
from quasar.results.loading import load
from quasar.results.provenance import provenance_of, read_provenance
from quasar.results.quantities import QUANTITIES, estimates
from quasar.results.rows import read_rows, rows_of_runs, write_rows
from quasar.results.runs import StoredRun
from quasar.results.schema import ForcedAnswer, PromptRecord
from quasar.results.store import write_status
from tests.records import environment, turn
from tests.synthetic import FAMILIES, MAIN, experiment_rows, synthetic_provenance

NGRAM, INT8 = MAIN[1], MAIN[2]


def test_an_interval_equals_that_of_scipy_within_resampling_noise() -> None:
    generator = np.random.default_rng(5)
    steps = generator.integers(40, 90, 30).astype(float)
    tokens = steps * generator.lognormal(0.4, 0.3, 30)
    columns = {"tokens": tokens[:, None], "steps": steps[:, None]}
    found = estimate(columns, ["one"] * 30, ratio_of_totals("tokens", "steps"))

    def ratio(tokens: np.ndarray, steps: np.ndarray, axis: int) -> np.ndarray:
        return tokens.sum(axis) / steps.sum(axis)

    other = bootstrap((tokens, steps), ratio, paired=True, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    assert found.value == pytest.approx(tokens.sum() / steps.sum())
    width = other.high - other.low
    assert found.low == pytest.approx(other.low, abs=0.06 * width)
    assert found.high == pytest.approx(other.high, abs=0.06 * width)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(6)
    families = [family for family in FAMILIES for _ in range(16)]
    prompts = len(families)
    covered = 0
    for _ in range(200):
        # The logarithms of the prompts' ratios have the mean 0.4.
        logs = 0.4 + generator.normal(0, 0.15, (prompts, 1)) + generator.normal(0, 0.01, (prompts, 2))
        columns = {"log": logs + generator.normal(0, 0.003, (1, 2)), "ones": np.ones((prompts, 2))}
        found = estimate(columns, families, geometric_mean("log", "ones"))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= np.exp(0.4) <= found.high
    assert 180 <= covered <= 198


def test_means_of_totals_and_of_families() -> None:
    columns = {"a": np.array([[9.0], [6.0], [5.0]]), "b": np.array([[3.0], [3.0], [4.0]])}
    families = ["math", "math", "code"]
    assert estimate(columns, families, ratio_of_totals("a", "b")).value == 2.0
    assert estimate(columns, families, mean_over_families("a", "b")).value == pytest.approx((15 / 6 + 5 / 4) / 2)


def test_one_prompt_has_no_interval_but_shows_its_repetitions() -> None:
    found = estimate({"a": np.array([[2.0, 4.0]]), "b": np.ones((1, 2))}, ["one"], ratio_of_totals("a", "b"))
    assert (found.value, found.low, found.high, found.by_repetition) == (3.0, None, None, (2.0, 4.0))


def test_values_that_never_vary_have_no_interval() -> None:
    found = estimate({"a": np.full((5, 1), 2.0), "b": np.ones((5, 1))}, ["one"] * 5, ratio_of_totals("a", "b"))
    assert (found.value, found.low, found.high) == (2.0, None, None)


def test_a_drift_between_repetitions_widens_the_interval() -> None:
    generator = np.random.default_rng(7)
    ones = np.ones((40, 2))
    steady = 1.5 + generator.normal(0, 0.05, (40, 2))
    drifting = steady * np.array([[0.95, 1.05]])
    narrow, wide = (
        estimate({"a": values, "b": ones}, ["one"] * 40, ratio_of_totals("a", "b")) for values in (steady, drifting)
    )
    assert narrow.high is not None
    assert narrow.low is not None
    assert wide.high is not None
    assert wide.low is not None
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_holm_adjusts_in_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_partner_is_the_unquantized_verifier_with_the_same_settings() -> None:
    rows = experiment_rows(MAIN, ("math",), prompts=2)
    rows = rows[rows["temperature"] == 0]
    found = partner_rows(rows[rows["arm"] == INT8.name], rows)
    assert found is not None
    assert set(found["partner_arm"]) == {NGRAM.name}
    assert list(found["partner_text_ms"]) == list(rows[rows["arm"] == NGRAM.name]["text_ms"])
    lookahead = rows[rows["arm"] == MAIN[4].name]
    assert partner_rows(lookahead, rows) is None
    assert QUANTITIES["interaction"].of(lookahead, rows) is None


def test_the_gains_multiply_to_the_speedup() -> None:
    rows = experiment_rows(MAIN[:3], ("math", "chat"), prompts=3)
    names = ("quantization_alone", "speculation_alone", "interaction", "reference_text_speedup")
    by_arm = {group.arm: values for group, values in estimates(rows, names)}
    found = [value.value for value in by_arm[INT8.name].values() if value is not None]
    assert found[0] * found[1] * found[2] == pytest.approx(found[3])


def test_the_memory_bound_speedup_charges_the_weights_that_drafting_reads() -> None:
    rows = experiment_rows([replace(MAIN[1], drafter="layerskip")], FAMILIES, prompts=2, repetitions=1)
    found = QUANTITIES["memory_bound_speedup"].of(rows)
    assert found is not None
    emitted, steps, drafted = (float(rows[name].sum()) for name in ("emitted", "steps", "drafted"))
    assert found.value == pytest.approx(emitted / (steps + 0.75 * drafted), rel=1e-3)


def test_a_prompt_without_a_value_is_left_out_and_a_repetition_without_any_does_not_count() -> None:
    rows = experiment_rows([INT8], ("math",), prompts=4)
    kl = QUANTITIES["kl_to_reference"].of(rows)
    assert kl is not None
    assert kl.by_repetition == ()
    rows.loc[(rows["question"] == "math-0") & (rows["repetition"] == 1), "text_ms"] = None
    found = QUANTITIES["reference_text_speedup"].of(rows)
    assert found is not None
    rest = rows[rows["question"] != "math-0"]
    assert found.value == pytest.approx(rest["text_ar_ref_ms"].sum() / rest["text_ms"].sum())
    assert QUANTITIES["reference_text_speedup"].of(rows.assign(text_ms=None)) is None
    assert QUANTITIES["reference_text_speedup"].of(rows.drop(columns="text_ms")) is None
    assert QUANTITIES["reference_text_speedup"].text(None) == "-"


def test_answers_that_only_the_first_repetition_graded_are_estimated() -> None:
    rows = experiment_rows([INT8], ("math",), prompts=4)
    rows["correct"] = [True, False, True, True] + [None] * 4
    found = QUANTITIES["task_accuracy"].of(rows)
    assert found is not None
    assert found.value == 0.75


def stored(folder: Path, arm: str | None = None, state: str = "done", **changes: object) -> StoredRun:
    """Write a finished run of two prompts and return it."""
    folder.mkdir(parents=True)
    values = environment(2).to_json()
    values["model"].update({key: changes.pop(key) for key in ("origin",) if key in changes})
    values.update({key: changes.pop(key) for key in ("git_commit", "threads", "device") if key in changes})
    (folder / "environment.json").write_text(json.dumps(values))
    write_status(folder, "done", None, "hash")
    forced = ForcedAnswer([1, 2, 3], [2], [0.1, 0.2], [True, False], [0.0, 0.0], [True, True], 5.0, 8.0, 10.0)
    records = [
        PromptRecord(question, "math", [turn([2, 3], [1, 3])], fidelity=[forced], repetition=repetition)
        for repetition in range(2)
        for question in ("a", "b")
    ]
    (folder / "generations.jsonl").write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    config = {
        "arm": arm,
        "verifier": {"name": "int8", "ratio": changes.pop("ratio", None)},
        "drafter": {"name": "ngram"},
        "decode": {"temperature": 0.0, "max_new_tokens": 8, "draft_tokens": None},
        "sweep": {"share_baselines": False},
    }
    summary = {"model": "tiny", "weight_bytes": 10, "kv_bytes_per_token": 1, "prompts": 2, "repetitions": 2}
    facts = {"code_versions": ("abc",), "machines": ("here",), **changes}
    return StoredRun(folder, state, config=config, summary=summary, **facts)  # type: ignore[arg-type]


def test_rows_hold_the_sums_of_a_prompt(tmp_path: Path) -> None:
    rows = rows_of_runs([stored(tmp_path / "0", "an arm")])
    assert len(rows) == 4
    row = rows.iloc[0].to_dict()
    expected = {
        "arm": "an arm",
        "verifier": "int8",
        "draft_tokens": "",
        "question": "a",
        "steps": 2,
        "drafted": 5,
        "accepted": 4,
        "emitted": 6,
        "draft_ms": 4.0,
        "decode_ms": 8.0,
        "text_tokens": 2,
        "text_steps": 1,
        "text_ms": 5.0,
        "text_ar_same_ms": 8.0,
        "text_ar_ref_ms": 10.0,
        "scored": 2,
        "top1": 1,
        "match_length": 1,
        "weight_bytes": 10,
    }
    assert {name: row[name] for name in expected} == expected
    assert row["kl"] == pytest.approx(0.3)
    assert list(row["depth_by_position"]) == [2, 2, 1]
    assert list(row["drafted_by_length"]) == [2, 2, 1]
    assert list(row["accepted_by_position"]) == [2, 1, 1]
    # The draft of two tokens reached position 2 but not 3, because it has none there.
    assert list(row["reached_by_position"]) == [2, 2, 1]
    write_rows(rows, tmp_path / "results.parquet")
    again = read_rows(tmp_path / "results.parquet")
    assert [group.arm for group in groups(again)] == ["an arm"]
    assert again["text_ms"].tolist() == rows["text_ms"].tolist()
    with pytest.raises(RequestError, match=r"none\.parquet: no such file; make reproduce"):
        read_rows(tmp_path / "none.parquet")


def test_arms_without_a_name_are_named_by_what_differs(tmp_path: Path) -> None:
    runs = [stored(tmp_path / str(number), ratio=ratio) for number, ratio in enumerate((0.1, 0.3))]
    assert arm_names(runs) == ["int8, ratio=0.1", "int8, ratio=0.3"]
    assert arm_names(runs[:1]) == ["int8"]
    assert arm_names([stored(tmp_path / "2", "mine"), runs[0]]) == ["mine", "int8, ratio=0.1"]
    with pytest.raises(RequestError, match="arm 'int8' has more than one result for question a"):
        rows_of_runs([runs[0], stored(tmp_path / "3", ratio=0.1)])


def test_an_origin_is_stored_and_read(tmp_path: Path) -> None:
    provenance = provenance_of([stored(tmp_path / "0"), stored(tmp_path / "1")])
    assert (provenance.runs, provenance.prompts, provenance.repetitions) == (2, 2, (2,))
    provenance.write(tmp_path / "environment.json")
    assert read_provenance(tmp_path / "environment.json") == provenance
    assert "2 of 5 declared prompts" in " ".join(provenance.declared("name", 5).sentences())
    assert not provenance.declared("name", 2).is_reduced
    assert all(len(line) <= 40 for line in synthetic_provenance().footer(40))
    (tmp_path / "environment.json").write_text('{"machine": "here"}')
    with pytest.raises(RequestError, match="another version of the code wrote it"):
        read_provenance(tmp_path / "environment.json")
    with pytest.raises(RequestError, match="missing or damaged"):
        read_provenance(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "partial"}, r"1 of 2 runs are not done: 1 \(partial\); finish"),
        ({"code_versions": ("abc", "def")}, "several code versions: abc; def; draw the runs of each"),
        ({"machines": ("there",)}, "several machines: here; there"),
        ({"origin": "a hub"}, "several model origins: random weights; a hub"),
        ({"threads": 3}, "several numbers of threads: 1; 3"),
        ({"git_commit": "123"}, "several commits: None; 123"),
        ({"device": "cuda"}, "several devices: "),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    runs = [stored(tmp_path / "0"), stored(tmp_path / "1", **change)]  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=reason):
        provenance_of(runs)


def test_published_results_are_loaded(tmp_path: Path) -> None:
    rows = experiment_rows([INT8], ("math",), prompts=2)
    write_rows(rows, tmp_path / "results.parquet")
    synthetic_provenance().write(tmp_path / "environment.json")
    found, provenance = load(tmp_path)
    pd.testing.assert_frame_equal(found[["arm", "text_ms"]], rows[["arm", "text_ms"]])
    assert provenance == synthetic_provenance()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="contains no runs"):
        load(tmp_path / "empty")


def test_an_estimate_does_not_show_the_order_of_additions() -> None:
    """0.1 + 0.2 is not 0.3 in binary arithmetic, and another order of more terms has other last digits."""
    ones = np.array([[0.5], [0.5]])
    found = estimate({"sum": np.array([[0.1], [0.2]]), "ones": ones}, ["math"] * 2, ratio_of_totals("sum", "ones"))
    assert (found.value, found.low, found.high) == (0.3, 0.2, 0.4)
