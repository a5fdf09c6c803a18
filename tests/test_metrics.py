"""The table of metrics: every row against a hand-made run, and all that is derived from it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from experiments.exactness import table as exactness_table
from experiments.fidelity import table as fidelity_table
from experiments.main_table import table as main_table
from quasar.config.schema import CONF
from quasar.console import Reporter
from quasar.decoding import stopwatch
from quasar.results import metrics, schema
from quasar.results.collect import Collector, tabulate
from quasar.results.markdown import Column, markdown, rows_of
from quasar.results.metrics import METRICS, Measured, Metric, compute, named, summary_of
from quasar.results.report import print_report
from quasar.results.schema import Baselines, Exactness, ForcedAnswer, PromptRecord, Timing
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
    answer = ForcedAnswer([5, 6, 7, 8], [2, 2], [0.1, 0.2, 0.3, 0.4], [True, True, False, True], [0.0] * 4, [True] * 4)
    return [PromptRecord("1", "math", [first], True, [answer]), PromptRecord("2", "chat", [second])]


EXPECTED = {
    "model": "tiny",
    "drafter": "ngram",
    "verifier": "int4",
    "data": "builtin",
    "temperature": 0.0,
    "device": "cpu",
    "prompts": 2,
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
    "mean_context": 50 / 3,
    "bytes_per_step": 2_000_000 + 1000 * 50 / 3,
    "achieved_bandwidth_fraction": (2_000_000 + 1000 * 50 / 3) / 1e-3 / 1e10,
    "peak_memory_bytes": 5_000_000,
    "simulated": False,
    "lossy": False,
}


def test_every_metric_of_a_hand_made_run() -> None:
    values = compute(Measured(run_of_two(), facts()))
    # Either prompt alone bounds the bootstrap: 16 over 8 ms for 4 tokens each, and 1 over 1.
    low, high = values.pop("speedup_ci95")
    assert (low, high) == pytest.approx((1.0, 4.0))
    assert set(values) == set(EXPECTED)
    for name, expected in EXPECTED.items():
        assert values[name] == pytest.approx(expected), name


def test_what_was_not_measured_is_null() -> None:
    values = compute(Measured([PromptRecord("1", "chat", [turn([], [])])], facts(simulated=True)))
    unmeasured = [name for name, value in values.items() if value is None]
    assert unmeasured == [
        *("tokens_per_second", "mean_acceptance_length", "mean_acceptance_length_ref", "kl_to_reference"),
        *("top1_agreement", "kl_noise_floor", "top1_noise_floor", "exact_match_length", "distinct_4gram_ratio"),
        *("distinct_4gram_ratio_reference", "task_accuracy", "acceptance_rate", "drafter_notes", "draft_ms"),
        *("verify_ms", "overhead_ms", "step_ms", "speedup_vs_ar_same", "speedup_vs_ar_ref", "speedup_ci95"),
        *("exact_match_to_self", "exact_match_to_reference", "achieved_bandwidth_fraction", "mean_context"),
    ]
    assert [named(name).text(values[name]) for name in unmeasured] == ["-"] * len(unmeasured)


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
    """It is then in summary.json, in the run's table, in the table of runs, in the live curves and in Markdown."""
    longest = Metric(
        "longest_answer",
        lambda run: max(len(turn.token_ids) for turn in run.turns),
        *("tokens", "longest", "{:d} t".format),
        printed=True,
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
    assert markdown("run", rows_of(rows), ["longest_answer", "extent"])[2] == "| 0 | 8 t | [1, 2] |"


def test_the_table_of_runs_has_the_metrics_columns(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "0", composed("model=tiny"), resume=True)
    folder.begin(["run.py"], environment(prompts=2))
    folder.finish({**summary_of(compute(Measured(run_of_two(), facts()))), "of_other_code": 3})
    columns = list(tabulate(Collector(tmp_path).runs(), tmp_path).columns)
    expected = [name for metric in METRICS if metric.in_summary for name in metric.columns(None)]
    assert columns[columns.index("model") :] == [*expected, "of_other_code"]


def test_rows_show_what_is_missing() -> None:
    runs = pd.DataFrame({"run": ["a", "b"], "step_ms": pd.Series([1.256, None], dtype="Float64")})
    doubled = Column("twice", lambda run: "?" if run["step_ms"] is None else str(2 * run["step_ms"]))
    assert markdown("run", rows_of(runs), ["step_ms", doubled, "speedup_ci95"]) == [
        "| run | step ms | twice | 95 % interval |",
        "| --- | ---: | ---: | ---: |",
        "| a | 1.26 | 2.512 | - |",
        "| b | - | ? | - |",
    ]


def test_the_experiments_tables_are_made_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = summary_of(compute(Measured(run_of_two(), facts())))
    for job, verifier in enumerate(("fp16", "int8")):
        folder = RunFolder(tmp_path / f"s/{job}", composed(f"verifier={verifier}", "drafter=ngram"), resume=True)
        folder.begin(["run.py"], environment(prompts=2))
        folder.finish({**values, "verifier": verifier})
    unfinished = RunFolder(tmp_path / "s/2", composed("verifier=int4", "drafter=none"), resume=True)
    unfinished.begin(["run.py"], environment(prompts=2))
    tables = {}
    for module in (exactness_table, fidelity_table, main_table):
        monkeypatch.setattr(module, "HERE", tmp_path)
        module.main(tmp_path / "s")
        tables[module] = (tmp_path / "table.md").read_text().splitlines()
    unfinished.status("failed", "the end of the test")
    assert tables[exactness_table] == [
        "| verifier | drafter | state | prompts | tokens | = AR-same | τ | accept |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| fp16 | ngram | done | 2 | 11 | 50% | 2.00 | 0.429 |",
        "| int8 | ngram | done | 2 | 11 | 50% | 2.00 | 0.429 |",
        "| int4 | none | running | - | - | - | - | - |",
    ]
    assert tables[fidelity_table][0] == (
        "| verifier | weights MB | KL | top-1 | match length | τ_ref | τ | distinct 4-grams |"
    )
    assert tables[fidelity_table][2] == "| fp16 | 2 | 0.2500 | 0.750 | 2.0 | 2.00 | 2.00 | 0.80 |"
    assert tables[fidelity_table][-1].startswith(
        "Noise floor, the reference against itself in one pass and step by step: KL"
    )
    assert tables[main_table][2] == (
        "| fp16 | 2 | 4.00 | 1.00x | 500.0 | 2.00x | 1.50x | 3.00x | 1.00x to 4.00x | 2.00 | 2.00 | 0.2500 | 0.750 |"
    )


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
