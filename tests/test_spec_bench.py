"""Interoperability with Spec-Bench and SPEED-Bench: answer files that their evaluation reads, and prompt files."""

from __future__ import annotations

import json
from itertools import accumulate, chain, pairwise
from pathlib import Path
from statistics import fmean, median

import pandas as pd
import pytest
from typer.testing import CliRunner

from quasar.cli import app
from quasar.errors import RequestError
from quasar.evaluation.prompts import load_prompts
from quasar.results.answers import Answers
from quasar.results.schema import Milliseconds, PromptRecord
from quasar.results.specdec_bench import write_specdec_bench
from tests.compose import composed_run
from tests.in_process import Start, starter
from tests.records import turn


@pytest.fixture
def start(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Start:
    return starter(tmp_path, prompt_file, monkeypatch, capfd, tokens=12)


def answers(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def speed(lines: list[dict]) -> tuple[float, float]:
    """The arithmetic of Spec-Bench's evaluation/speed.py: mean accepted tokens, and tokens per second."""
    speeds, lengths = [], []
    for line in lines:
        choice = line["choices"][0]
        speeds.append(sum(choice["new_tokens"]) / sum(choice["wall_time"]))
        lengths += choice["accept_lengths"]
    return sum(lengths) / len(lengths), sum(speeds) / len(speeds)


def test_answers_are_written_as_spec_bench_reads_them(start: Start, tmp_path: Path) -> None:
    assert start("drafter=ngram", "evaluate.repetitions=2", "hydra.run.dir=out")[0] == 0
    done = CliRunner().invoke(app, ["collect", str(tmp_path / "out"), "--format", "spec-bench"])
    assert (done.exit_code, done.output) == (0, f"wrote {tmp_path}/out/spec-bench/tiny-ngram-fp16.jsonl\n")
    lines = answers(tmp_path / "out" / "spec-bench" / "tiny-ngram-fp16.jsonl")
    assert [(line["question_id"], line["category"]) for line in lines] == [(1, "math"), (2, "chat"), (3, "chat")]
    assert {line["model_id"] for line in lines} == {"tiny-ngram-fp16"}
    assert [[choice["index"] for choice in line["choices"]] for line in lines] == [[0, 1]] * 3
    assert [len(line["choices"][0]["turns"]) for line in lines] == [1, 1, 2]

    records = answers(tmp_path / "out" / "generations.jsonl")
    two = next(record for record in records if record["question_id"] == "3" and record["repetition"] == 1)
    choice = lines[2]["choices"][1]
    assert choice["turns"] == [turn["text"] for turn in two["turns"]]
    assert choice["new_tokens"] == [len(turn["token_ids"]) for turn in two["turns"]]
    assert choice["decoding_steps"] == [len(turn["steps"]["drafted"]) for turn in two["turns"]]
    assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
    # The first token of every turn comes from the prefill.
    assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) - 2
    laps = [sum(sum(phase) for phase in turn["milliseconds"].values()) / 1000 for turn in two["turns"]]
    assert choice["wall_time"] == pytest.approx(laps)


def test_their_evaluation_computes_what_the_run_did(start: Start, tmp_path: Path) -> None:
    assert start("drafter=ngram", "hydra.run.dir=out")[0] == 0
    CliRunner().invoke(app, ["collect", str(tmp_path / "out"), "--format", "spec-bench", "--output", str(tmp_path)])
    length, speed_of_turns = speed(answers(tmp_path / "tiny-ngram-fp16.jsonl"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert length == pytest.approx(summary["mean_acceptance_length"])
    assert speed_of_turns > 0


def test_every_run_of_a_sweep_has_its_own_file(start: Start, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert start("data.limit=1", f"hydra.run.dir=runs/{name}")[0] == 0
    CliRunner().invoke(app, ["collect", str(tmp_path / "runs"), "--format", "spec-bench"])
    found = sorted(file.name for file in (tmp_path / "runs" / "spec-bench").iterdir())
    assert found == ["tiny-none-fp16-a.jsonl", "tiny-none-fp16-b.jsonl"]


def chunks_of(record: dict) -> list[int]:
    """The lengths that specdec_bench counts: in no turn the prefill's token or the last step."""
    return [length for turn in record["turns"] for length in [1, *turn["steps"]["emitted"]][1:-1] or [1]]


def times(turn: dict) -> list[float]:
    """When a turn began, when its prefill ended, and when each of its steps did, in seconds."""
    phases = turn["milliseconds"]
    laps = [*phases["prefill"], *map(sum, zip(*(phases[name] for name in phases if name != "prefill"), strict=True))]
    return [0.0, *accumulate(lap / 1000 for lap in laps)]


def test_result_files_of_specdec_bench(start: Start, tmp_path: Path) -> None:
    """The files hold what specdec_bench's metrics would compute from the chunks and times of every request."""
    assert start("drafter=ngram", "evaluate.repetitions=2", "hydra.run.dir=out")[0] == 0
    done = CliRunner().invoke(app, ["collect", str(tmp_path / "out"), "--format", "specdec-bench"])
    folder = tmp_path / "out" / "specdec-bench" / "tiny-ngram-fp16"
    assert done.exit_code == 0
    assert f"wrote {folder}/timing.json\n" in done.output
    records = answers(tmp_path / "out" / "generations.jsonl")
    acceptance, timing = (json.loads((folder / name).read_text()) for name in ("acceptance_rate.json", "timing.json"))
    assert json.loads((folder / "specbench_results.json").read_text()) == acceptance[0]

    for repetition in (0, 1):
        chosen = [record for record in records if record["repetition"] == repetition]
        lengths = {record["question_id"]: chunks_of(record) for record in chosen}
        means = {name: sum(found) / len(found) for name, found in lengths.items()}
        found = acceptance[repetition]
        assert found["Request_AL"] == pytest.approx(means)
        assert found["Category_AL"] == pytest.approx({"chat": (means["2"] + means["3"]) / 2, "math": means["1"]})
        assert found["Average_AL"] == pytest.approx(sum(means.values()) / 3)
        steps = sorted(chain(*lengths.values()))
        assert found["Acceptance_Length_Histogram"] == {str(length): steps.count(length) for length in sorted({*steps})}
        at_least = {str(length): sum(step >= length for step in steps) / len(steps) for length in sorted({*steps})}
        assert found["Joint_Acceptance_Rate"] == pytest.approx(at_least)
        product = 1.0
        for length, conditional in found["Conditional_Acceptance_Rate"].items():
            product *= conditional
            assert product == pytest.approx(at_least[length])

        turns = [turn for record in chosen for turn in record["turns"]]
        ends, tokens = [times(turn) for turn in turns], [len(turn["token_ids"]) for turn in turns]
        found = timing[repetition]
        assert found["Output TPS"] == pytest.approx(sum(tokens) / sum(end[-1] for end in ends))
        assert float(found["TTFT Time"]["max"]) == pytest.approx(max(end[1] for end in ends), abs=1e-4)
        gaps = [after - before for end in ends for before, after in pairwise(end)]
        assert float(found["Request Generation Step Time"]["quantiles"]["0.5"]) == pytest.approx(median(gaps), abs=1e-4)
        speeds = [(count - 1) / (end[-1] - end[1]) for count, end in zip(tokens, ends, strict=True)]
        assert float(found["Request Generation Tokens Per Second"]["mean"]) == pytest.approx(fmean(speeds), abs=1e-3)
        assert float(found["Number of Output Tokens"]["mean"]) == pytest.approx(fmean(tokens), abs=1e-4)

    responses = answers(folder / "specbench_responses.jsonl")
    first = next(record for record in records if record["question_id"] == "3" and record["repetition"] == 0)
    assert [line["question_id"] for line in responses] == [1, 2, 3]
    assert responses[2]["choices"] == [{"index": 0, "turns": [turn["text"] for turn in first["turns"]]}]
    assert responses[2]["acceptance_lengths"] == chunks_of(first)


def test_turns_that_end_early_count_as_one_token_in_specdec_bench(tmp_path: Path) -> None:
    """A turn without a step, and one whose only step may be cut, have no time between tokens or no length of steps."""
    first, second = turn([], []), turn([3], [2])
    records = [PromptRecord("a", "math", [first]), PromptRecord("7", "math", [second])]
    write_specdec_bench([Answers("run", 0.0, records)], tmp_path)
    found = json.loads((tmp_path / "run" / "specbench_results.json").read_text())
    assert found["Request_AL"] == {"a": 1.0, "7": 1.0}
    assert found["Acceptance_Length_Histogram"] == {"1": 2}
    write_specdec_bench([Answers("only", 0.0, records[:1])], tmp_path)
    (timing,) = json.loads((tmp_path / "only" / "timing.json").read_text())
    assert "TTFT Time" in timing
    assert "Request Generation Step Time" not in timing


def test_the_times_between_tokens_begin_with_the_prefill_in_specdec_bench(tmp_path: Path) -> None:
    laps = [[100.0, 50.0]] * 4
    timed = turn([3, 3], [2, 1], milliseconds=Milliseconds([700.0], *laps))
    write_specdec_bench([Answers("run", 0.0, [PromptRecord("1", "math", [timed])])], tmp_path)
    (found,) = json.loads((tmp_path / "run" / "timing.json").read_text())
    steps = found["Request Generation Step Time"]
    assert (steps["min"], steps["quantiles"]["0.5"], steps["max"]) == ("0.2000", "0.4000", "0.7000")
    assert found["E2E Request Time"]["mean"] == "1.3000"
    assert found["TTFT Time"]["mean"] == "0.7000"
    assert found["Request Generation Tokens Per Second"]["mean"] == f"{5 / 0.6:.4f}"


@pytest.mark.parametrize("form", ["spec-bench", "specdec-bench"])
def test_runs_without_answers_are_refused(tmp_path: Path, form: str) -> None:
    (tmp_path / "status.json").write_text("{}")
    done = CliRunner().invoke(app, ["collect", str(tmp_path), "--format", form])
    assert done.exit_code == 2
    assert f"{tmp_path}: no run has an answer yet" in done.output


ROWS = [
    {"question_id": "a1", "category": "coding", "sub_category": "x", "turns": ["Write.", "Shorten it."], "source": "s"},
    {"question_id": "a2", "category": "coding", "sub_category": "x", "turns": ["Write again."], "source": "s"},
    {"question_id": "b1", "category": "math", "sub_category": "y", "turns": ["1 + 1?"], "source": "s"},
]


def prepared(folder: Path, rows: list[dict]) -> Path:
    """A folder as specdec_bench's prepare_data.py writes it."""
    (folder / "qualitative").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "qualitative" / "test.parquet")
    return folder


def test_prepared_prompts_of_speed_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = prepared(tmp_path / "speed", ROWS)
    found = load_prompts(composed_run("data=speed_bench", f"data.path={folder}", "data.limit=1").data)
    assert [(prompt.key, prompt.family, prompt.turns) for prompt in found] == [
        ("speed_bench/a1", "coding", ("Write.", "Shorten it.")),
        ("speed_bench/b1", "math", ("1 + 1?",)),
    ]
    everything = load_prompts(composed_run("data=speed_bench", f"data.path={folder}", "data.limit=null").data)
    assert [prompt.key for prompt in everything] == ["speed_bench/a1", "speed_bench/a2", "speed_bench/b1"]


def test_prompts_of_speed_bench_that_were_not_fetched_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    missing = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH\n\nfor this role"
    folder = prepared(tmp_path / "speed", [*ROWS, {**ROWS[0], "question_id": "c", "turns": [missing]}])
    with pytest.raises(RequestError, match=r"question c of SPEED-Bench has no text yet: .*prepare_data\.py"):
        load_prompts(composed_run("data=speed_bench", f"data.path={folder}").data)
