"""The table of metrics: every metric of a hand-made run, and everything that is derived from the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from quasar.config.schema import CONF
from quasar.decoding import stopwatch
from quasar.results import metrics, schema
from quasar.results.collect import Collector, tabulate
from quasar.results.console import Reporter
from quasar.results.measured import Measured
from quasar.results.metric import Metric
from quasar.results.metrics import METRICS, compute, named, summary_of
from quasar.results.report import print_report
from quasar.results.schema import Baselines, Exactness, ForcedAnswer, PassRecord, PromptRecord, Timing
from quasar.results.store import RunFolder
from quasar.results.wandb.log import _history
from tests.compose import composed
from tests.records import environment, facts, turn


def run_of_two() -> list[PromptRecord]:
    """Steps of 1 ms per phase. The first prompt emits 3 + 1 tokens in two steps, the second one 2 in one step."""
    timings = (
        Baselines(Timing(4, 16.0, "here"), Timing(4, 32.0, "here")),
        Baselines(Timing(2, 2.0, "here"), Timing(2, 4.0, "here")),
    )
    first = turn(
        *([4, 2], [2, 0], 10),
        token_ids=[1, 2, 3, 4, 1, 2, 3, 4],
        baselines=timings[0],
        exactness=Exactness(True, None, None, False),
    )
    second = turn(*([1], [1], 30), baselines=timings[1], exactness=Exactness(False, 1, 0.5, False))
    answer = ForcedAnswer(
        *([5, 6, 7, 8], [2, 2], [0.1, 0.2, 0.3, 0.4], [True, True, False, True], [0.0] * 4, [True] * 4),
        forced_ms=4.0,
        ar_same_ms=8.0,
        ar_ref_ms=10.0,
    )
    return [PromptRecord("1", "math", [first], True, [answer]), PromptRecord("2", "chat", [second])]


EXPECTED = {
    "model": "tiny",
    "drafter": "ngram",
    "verifier": "int4",
    "data": "builtin",
    "temperature": 0.0,
    "device": "cpu",
    "model_origin": "random weights",
    "weights_on_grid": None,
    "reference_text_speedup": 10.0 / 4.0,
    "reference_text_speedup_ci95": None,
    "prompts": 2,
    "repetitions": 1,
    "tokens_generated": 8 + 3,
    "steps": 3,
    "drafted": 7,
    "accepted": 3,
    "tokens_per_second": 6 / 12e-3,
    "prefill_tokens_per_second": 40 / 4e-3,
    "mean_acceptance_length": 6 / 3,
    "mean_acceptance_length_ref": 2.0,
    "kl_to_reference": 0.25,
    "top1_agreement": 0.75,
    "kl_noise_floor": 0.0,
    "top1_noise_floor": 1.0,
    "exact_match_length": 2.0,
    "distinct_4gram_ratio": 4 / 5,  # the other answer is too short
    "distinct_4gram_ratio_reference": 1.0,
    "task_accuracy": 1.0,  # the other one was not graded
    "acceptance_rate": 3 / 7,
    "acceptance_by_position": [2 / 3, 1 / 2, 0.0, 0.0],
    "drafter_notes": None,
    "draft_ms": 2.0,
    "verify_ms": 1.0,
    "overhead_ms": 1.0,
    "step_ms": 4.0,
    "speedup_vs_ar_same": (6 / 12) / (6 / 18),
    "speedup_vs_ar_ref": (6 / 12) / (6 / 36),
    "exact_match_to_self": 0.5,
    "exact_match_to_reference": 0.0,
    "weight_bytes": 2_000_000,
    "kv_bytes_per_token": 1000,
    "draft_weight_bytes": 0,
    "memory_bound_speedup": 6 / 3,  # no draft model: τ
    "mean_context": 50 / 3,
    "bytes_per_step": 2_000_000 + 1000 * 50 / 3,
    "achieved_bandwidth_fraction": (2_000_000 + 1000 * 50 / 3) / 1e-3 / 1e10,
    "peak_memory_bytes": 5_000_000,
    "simulated": False,
    "lossy": False,
    **dict.fromkeys(("pass_cost", "predicted_speedup", "prediction_residual", "share_of_oracle")),  # no timed passes
    "disturbed": None,
    "emulated": False,
}


def test_a_draft_model_lowers_the_memory_bound_speedup() -> None:
    # 7 draft tokens in 3 steps, each of which reads 1.5 of 2 MB: τ / (1 + 0.75 * 7 / 3).
    values = compute(Measured(run_of_two(), facts(draft_weight_bytes=1_500_000)))
    assert values["memory_bound_speedup"] == pytest.approx(2 / 2.75)
    assert compute(Measured(run_of_two(), facts(draft_weight_bytes=None)))["memory_bound_speedup"] is None


def test_every_metric_of_a_hand_made_run() -> None:
    values = compute(Measured(run_of_two(), facts()))
    # Either prompt alone bounds the bootstrap: 16 over 8 ms for 4 tokens each, and 1 over 1.
    low, high = values.pop("speedup_ci95")
    assert (low, high) == pytest.approx((1.0, 4.0))
    assert set(values) == set(EXPECTED)
    for name, expected in EXPECTED.items():
        assert values[name] == pytest.approx(expected), name


def test_times_of_an_emulation_are_no_speedup() -> None:
    values, measured = (compute(Measured(run_of_two(), facts(emulated=emulated))) for emulated in (True, False))
    assert values["emulated"] is True
    speeds = {"speedup_vs_ar_same", "speedup_vs_ar_ref", "speedup_ci95", "achieved_bandwidth_fraction"}
    speeds |= {"reference_text_speedup", "reference_text_speedup_ci95"}
    assert {name for name in values if values[name] is None and measured[name] is not None} == speeds - {
        name for name in speeds if measured[name] is None
    }
    assert all(values[name] is None for name in speeds)
    assert measured["speedup_vs_ar_ref"] is not None


def test_what_was_not_measured_is_null() -> None:
    values = compute(Measured([PromptRecord("1", "chat", [turn([], [])])], facts(simulated=True)))
    unmeasured = [name for name, value in values.items() if value is None]
    assert unmeasured == [
        *("tokens_per_second", "mean_acceptance_length", "mean_acceptance_length_ref", "kl_to_reference"),
        *("top1_agreement", "kl_noise_floor", "top1_noise_floor", "exact_match_length", "distinct_4gram_ratio"),
        *("distinct_4gram_ratio_reference", "task_accuracy", "acceptance_rate", "drafter_notes", "draft_ms"),
        *("verify_ms", "overhead_ms", "step_ms", "speedup_vs_ar_same", "speedup_vs_ar_ref", "speedup_ci95"),
        *("reference_text_speedup", "reference_text_speedup_ci95", "memory_bound_speedup", "pass_cost"),
        *("predicted_speedup", "prediction_residual", "share_of_oracle", "exact_match_to_self"),
        *("exact_match_to_reference",),
        *("achieved_bandwidth_fraction", "weights_on_grid", "disturbed", "mean_context"),
    ]
    assert [named(name).text(values[name]) for name in unmeasured] == ["-"] * len(unmeasured)


def timed(times: dict[int, float], context: int) -> list[PassRecord]:
    """Three repetitions of every number of rows, of which the last one was disturbed."""
    return [
        PassRecord(rows, context, repetition, milliseconds * (1, 1, 9)[repetition], 1.0, 1)
        for rows, milliseconds in times.items()
        for repetition in range(3)
    ]


def test_timed_passes_predict_the_speedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drafts of 4, 2 and 1 tokens, of which 2, 0 and 1 are accepted, behind contexts near 16 tokens."""
    passes = timed({1: 2.0, 2: 2.2, 4: 3.0, 6: 4.0}, 16) + timed({1: 50.0, 6: 60.0}, 512)
    run = Measured(run_of_two(), facts(), passes)
    values = compute(run)
    drafted = [3.5, 2.6, 2.2]  # of 5, 3 and 2 rows
    accepted = [2.6, 2.0, 2.2]  # of 3, 1 and 2 rows
    cost = sum(drafted) / 3 / 2.0
    assert values["pass_cost"] == pytest.approx(cost)
    assert values["predicted_speedup"] == pytest.approx(2.0 / cost)
    assert values["prediction_residual"] == pytest.approx(1.5 / (2.0 / cost))
    assert values["share_of_oracle"] == pytest.approx(sum(accepted) / sum(drafted))
    print_report(Reporter(), run, values, tmp_path)
    assert "predict: 1.45x, τ 2.00 over a pass cost of 1.38; measured 1.50x, 1.04 of it;" in capsys.readouterr().out
    # A pass that is longer than all timed ones cannot be predicted.
    assert compute(Measured(run_of_two(), facts(), timed({1: 2.0, 4: 3.0}, 16)))["pass_cost"] is None
    assert run.of_family("chat").passes == passes


def test_a_drafters_notes_are_means_and_counts_per_word() -> None:
    one = turn([4, 2], [2, 0])
    one.steps.notes.update(chosen_length=[4, 3], member=["ngram", "model"])
    two = turn([1], [1])
    two.steps.notes.update(chosen_length=[2], member=["ngram"])
    notes = compute(Measured([PromptRecord("1", "chat", [one, two])], facts()))["drafter_notes"]
    ngram = {"steps": 2, "drafted": 5, "accepted": 3, "emitted": 5}
    model = {"steps": 1, "drafted": 2, "accepted": 0, "emitted": 1}
    assert notes == {
        "chosen_length": 3.0,
        "member": {
            "model": {**model, "acceptance_rate": 0.0, "mean_acceptance_length": 1.0},
            "ngram": {**ngram, "acceptance_rate": 0.6, "mean_acceptance_length": 2.5},
        },
    }


def test_adding_records_one_by_one_changes_nothing() -> None:
    grown = Measured(facts=facts())
    for record in run_of_two():
        grown.add(record)
    assert compute(grown) == compute(Measured(run_of_two(), facts()))


def test_a_metric_is_added_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is then in summary.json, in the run's table, in the table of runs and in the live curves."""
    longest = Metric(
        "longest_answer",
        lambda run: max(len(turn.token_ids) for turn in run.turns),
        *("tokens", "longest", "{:d} t".format),
        rank=1,
        curve="longest",
    )
    extent = Metric("extent", lambda run: [1, 2], heading="extent", form=str, parts=("low", "high"))
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, longest, extent))
    run = Measured(run_of_two(), facts())
    values = compute(run)
    folder = RunFolder(tmp_path / "0", composed("model=tiny"), resume=True)
    folder.begin(["run.py"], environment(prompts=2))
    folder.finish(summary_of(values))
    summary = json.loads((tmp_path / "0/summary.json").read_text())
    assert (summary["longest_answer"], summary["extent"]) == (8, [1, 2])

    print_report(Reporter(), run, values, tmp_path)
    printed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [cells[-1] for cells in printed if cells] == ["longest", "8 t", "3 t", "8 t"]

    rows = tabulate(Collector(tmp_path).runs(), tmp_path)
    assert list(rows.longest_answer) == [8]
    assert (list(rows.extent_low), list(rows.extent_high)) == ([1], [2])
    history = _history(run.records[1], run)
    assert (history["prompt/longest"], history["so_far/longest"]) == (3, 8)


def test_the_table_of_runs_has_the_metrics_columns(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "0", composed("model=tiny"), resume=True)
    folder.begin(["run.py"], environment(prompts=2))
    folder.finish({**summary_of(compute(Measured(run_of_two(), facts()))), "of_other_code": 3})
    columns = list(tabulate(Collector(tmp_path).runs(), tmp_path).columns)
    expected = [name for metric in METRICS if metric.in_summary for name in metric.columns(None)]
    assert columns[columns.index("model") :] == [*expected, "of_other_code"]


def test_metrics_of_a_run_need_to_know_it() -> None:
    with pytest.raises(ValueError, match="records alone are not enough"):
        named("weight_bytes").compute(Measured(run_of_two()))


def test_names_and_phases_fit_their_sources() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert schema.PHASES == stopwatch.PHASES
    assert schema.DECODE_PHASES == stopwatch.DECODE_PHASES
    sweep = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())["metric"]
    better = {"maximize": "higher", "minimize": "lower"}[sweep["goal"]]
    assert named(sweep["name"]).better == better


def forced_answer(forced_ms: float, ar_ref_ms: float | None) -> ForcedAnswer:
    return ForcedAnswer([5, 6], [1], [0.0] * 2, [True] * 2, [0.0] * 2, [True] * 2, forced_ms, ar_ref_ms, ar_ref_ms)


def records_with(*answers: ForcedAnswer) -> list[PromptRecord]:
    return [PromptRecord(str(key), "math", [], None, [answer]) for key, answer in enumerate(answers)]


def test_reference_text_speedup_is_the_ratio_of_total_times_with_an_interval_around_it() -> None:
    times = [(1.0, 1.8), (2.0, 4.4), (4.0, 7.0), (3.0, 6.9), (1.5, 2.4)]
    run = Measured(records_with(*(forced_answer(*pair) for pair in times)))
    speedup = named("reference_text_speedup").compute(run)
    assert speedup == pytest.approx(22.5 / 11.5)
    low, high = named("reference_text_speedup_ci95").compute(run)
    assert 1.6 < low < speedup < high < 2.3


def test_a_run_without_baselines_has_no_reference_text_speedup() -> None:
    run = Measured(records_with(forced_answer(1.0, None), forced_answer(2.0, None)))
    assert named("reference_text_speedup").compute(run) is None
    assert named("reference_text_speedup_ci95").compute(run) is None


def test_equal_ratios_have_no_bca_interval() -> None:
    run = Measured(records_with(forced_answer(1.0, 2.0), forced_answer(1.0, 2.0)))
    assert named("reference_text_speedup").compute(run) == 2.0
    assert named("reference_text_speedup_ci95").compute(run) is None
