"""Timed passes: what a run measures and continues, the estimates from hand-made times, and what is published."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from quasar.config.schema import PassesConfig
from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.errors import RequestError
from quasar.experiment import reproduce as reproduction
from quasar.experiment.main import main
from quasar.experiment.passes import PassTimer
from quasar.results.generations import PASSES as PASS_LINES
from quasar.results.generations import read_passes
from quasar.results.intervals import Estimate
from quasar.results.pass_rows import pass_shortcomings
from quasar.results.pass_tables import PASS_TABLES
from quasar.results.passes import PassTimes, nearest, pass_times, quotient, speculations
from quasar.results.publish import PASSES, RESULTS, TABLE, redraw
from quasar.results.rows import read_rows
from quasar.results.schema import Json, PassRecord, checksum
from quasar.verifiers.base import Verifier, VerifierCost
from tests.in_process import reproduced
from tests.selection import fast

TINY = (
    *("model=tiny", "threads=1", "calibration.prompts=2", "decode.max_new_tokens=8", "data.limit=1"),
    "hydra.sweeper.only=[fp16,'int8, 8-bit head']",
    *("evaluate.passes.rows=[1,2,6]", "evaluate.passes.contexts=[16,32]", "evaluate.passes.repetitions=3"),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a tiny repetition of memory_wall leaves."""
    return reproduced("memory_wall", TINY, tmp_path_factory.mktemp("wall"))


def times(pass_ms: list[list[float]], reference_ms: float = 20.0, **others: object) -> PassTimes:
    """Passes with 1, 2 and 4 rows, [3, R], that read 100 MB."""
    values = np.array(pass_ms)
    return dataclasses.replace(
        PassTimes(
            arm="int8",
            verifier="int8",
            context=512,
            rows=np.array([1, 2, 4]),
            pass_ms=values,
            reference_ms=np.full(values.shape, reference_ms),
            copy_bandwidth=np.full(values.shape, 20e9),
            bytes_read=100_000_000,
            weight_bytes=90_000_000,
        ),
        **others,
    )


def test_ratios_of_hand_made_times() -> None:
    found = times([[10.0], [11.0], [14.0]])
    assert found.milliseconds(2) == Estimate(11.0)
    assert found.relative_time(4) == Estimate(1.4)
    # Between measured numbers of rows the time is interpolated.
    assert found.cost(3).value == pytest.approx(12.5 / 20)
    # The mean of two passes is not the pass of their mean number of rows, 2.5.
    assert found.break_even({0: 0.5, 3: 0.5}).value == pytest.approx(12.0 / 20)
    assert found.rows_of_cost(12.5 / 20) == pytest.approx(3.0)
    # 100 MB in 10 ms are 10 GB/s, half of the copy bandwidth.
    assert found.bandwidth_share(1).value == pytest.approx(0.5)
    assert found.floor() == found.bandwidth_share(1)
    with pytest.raises(ValueError, match="5 rows are beyond the measured 1 to 4"):
        found.cost(5)


def test_a_ratio_is_taken_within_its_repetition() -> None:
    """The machine is three times slower in the second repetition, which no ratio shows."""
    found = times([[10.0, 30.0, 10.0], [12.0, 36.0, 12.0], [15.0, 45.0, 15.0]])
    assert found.relative_time(2) == Estimate(pytest.approx(1.2))
    assert found.milliseconds(2).value == 12.0
    assert (found.milliseconds(2).low, found.milliseconds(2).high) == (12.0, 36.0)


def test_intervals_hold_the_spread_of_the_repetitions() -> None:
    generator = np.random.default_rng(3)
    noise = generator.normal(1.0, 0.05, size=(3, 40))
    found = times((np.array([[10.0], [11.0], [14.0]]) * noise).tolist()).relative_time(4)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 1.4 < found.high
    assert 0.01 < found.high - found.low < 0.1
    # The same times give the same interval.
    assert found == times((np.array([[10.0], [11.0], [14.0]]) * noise).tolist()).relative_time(4)


def test_the_bend_is_interpolated_and_may_be_beyond_the_measured_rows() -> None:
    # 1.1 at two rows and 1.4 at four: 1.25 is half way.
    assert times([[10.0], [11.0], [14.0]]).bend() == Estimate(pytest.approx(3.0))
    assert times([[10.0], [15.0], [20.0]]).bend() == Estimate(pytest.approx(1.5))
    assert times([[10.0], [10.0], [11.0]]).bend().value == math.inf
    mixed = times([[10.0] * 4, [11.0] * 4, [14.0, 14.0, 14.0, 11.0]]).bend()
    assert mixed.value == pytest.approx(3.0)
    assert mixed.high == math.inf


def test_a_quotient_adds_the_distances_of_the_bounds_in_quadrature() -> None:
    found = quotient(Estimate(4.0, 2.0, 8.0), Estimate(2.0, 1.0, 4.0))
    assert found.value == 2.0
    assert found.low is not None
    assert found.low == pytest.approx(2 * 2 ** -math.sqrt(2))
    assert found.high == pytest.approx(2 * 2 ** math.sqrt(2))
    assert quotient(Estimate(4.0, 2.0, 8.0), Estimate(2.0)).low == pytest.approx(1.0)
    assert quotient(Estimate(4.0), Estimate(2.0)) == Estimate(2.0)


def decoded(**others: object) -> pd.DataFrame:
    """Rows of one arm: 1.5 draft tokens, 2 tokens and 14 ms per step, and 20 ms per token of AR-ref."""
    columns = {
        "arm": "int8",
        "verifier": "int8",
        "drafter": "ngram",
        "temperature": 0.0,
        "max_new_tokens": 8,
        "draft_tokens": "3",
        "family": "math",
        "question": ["1", "2"],
        "repetition": 0,
        "steps": [10, 10],
        "drafted": [20, 10],
        "drafted_by_length": [[8, 6, 6], [5, 5]],  # 7 steps draft nothing, 2 a token, 5 two and 6 three
        "context": [4000, 4000],
        "text_tokens": [20.0, 20.0],
        "text_steps": [10.0, 10.0],
        "text_ms": [140.0, 140.0],
        "text_ar_ref_ms": [400.0, 400.0],
    }
    return pd.DataFrame({**columns, **others})


def test_predicted_and_measured_speedup_of_hand_made_rows() -> None:
    near, far = times([[10.0], [11.0], [14.0]]), times([[100.0], [110.0], [140.0]], context=4096)
    (found,) = speculations([near, far], decoded())
    assert (found.draft_tokens, found.context) == (1.5, 512)
    # 7 passes of 10 ms, 2 of 11, 5 of 12.5 and 6 of 14: 11.925 ms, not the 11.75 of a pass with 1 + 1.5 rows.
    assert found.needed.value == pytest.approx(11.925 / 20)
    assert found.rows == pytest.approx(2 + 2 * 0.925 / 3)
    assert found.tau_ref.value == pytest.approx(2.0)
    assert found.predicted.value == pytest.approx(2.0 / (11.925 / 20))
    assert found.measured.value == pytest.approx(800 / 280)
    # A step takes 14 ms instead of the 11.925 ms of its pass.
    assert found.residual.value == pytest.approx(11.925 / 14)
    assert found.residual.value == pytest.approx(found.measured.value / found.predicted.value)
    assert nearest([near, far], "int8", 3000) is far
    assert nearest([near, far], "int4", 512) is None
    assert speculations([near], decoded(text_steps=None)) == []
    assert speculations([near], decoded(arm="another")) == []
    assert speculations([near], decoded(drafted_by_length=[[1] * 4, []])) == [], "no pass with 5 rows was timed"


def test_a_repetition_that_lacks_rows_is_left_out() -> None:
    columns = {"arm": "a", "verifier": "int8", "context": 16, "weight_bytes": 5, "kv_bytes": 2, "copy_bandwidth": 1e9}
    table = pd.DataFrame({**columns, "rows": [1, 2, 1], "repetition": [0, 0, 1], "pass_ms": 2.0, "reference_ms": 4.0})
    (found,) = pass_times(table)
    assert found.pass_ms.shape == (2, 1)
    assert found.bytes_read == 7
    with pytest.raises(RequestError, match="a, context 16: no repetition has timed every number of rows"):
        pass_times(table[table["rows"] == 2])


class Recording(Verifier):
    """A verifier that writes down what it is asked for, with a context window of 20 tokens."""

    context_length, device, dtype, cost = 20, torch.device("cpu"), torch.float32, VerifierCost(8, 2)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prefill(self, tokens: Tensor) -> Scores:
        self.calls.append(f"prefill {len(tokens)}")
        return Scores(torch.zeros(1, 4))

    def verify(self, last: int, draft: Draft) -> Scores:
        self.calls.append(f"verify {draft.rows}")
        return Scores(torch.zeros(draft.rows, 4))

    def keep(self, path: object) -> None:
        raise AssertionError

    def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
        raise AssertionError


def timed(done: list[PassRecord], rows: list[int]) -> tuple[list[PassRecord], Recording, Recording]:
    verifier, reference = Recording(), Recording()
    timer = PassTimer(PassesConfig(rows, [8, 16], 4), verifier, reference, [1, 2, 3], seed=0)
    records: list[PassRecord] = []
    timer.run(done, records.append)
    return records, verifier, reference


def test_every_pass_is_timed_beside_the_reference_in_an_order_of_its_repetition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quasar_kernels.bandwidth.CopyBandwidth.measure", lambda _: 5.0)
    records, verifier, reference = timed([], [1, 2, 3, 8])
    # 16 tokens and 8 rows exceed the window of 20.
    assert len(records) == 4 * 4 + 3 * 4
    assert (8, 16) not in {(record.rows, record.context) for record in records}
    orders = [[r.rows for r in records if (r.context, r.repetition) == (8, number)] for number in range(4)]
    assert all(sorted(order) == [1, 2, 3, 8] for order in orders)
    assert len(set(map(tuple, orders))) > 1
    # Each is preceded by an untimed one of the same model, and the reference has one row.
    assert reference.calls == ["prefill 8", *["verify 1"] * 32, "prefill 16", *["verify 1"] * 24]
    assert verifier.calls[:3] == ["prefill 8", *[f"verify {records[0].rows}"] * 2]
    assert {record.copy_bandwidth for record in records} == {5.0}

    # An attempt that continues times the rest in the same order.
    rest, *_ = timed(records[:9], [1, 2, 3, 8])
    assert [(r.context, r.repetition, r.rows) for r in rest] == [(r.context, r.repetition, r.rows) for r in records[9:]]
    nothing, verifier, _ = timed(records, [1, 2, 3, 8])
    assert (nothing, verifier.calls) == ([], [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.passes.rows=[2,4]", r"evaluate.passes.rows=\[2, 4\]: must be numbers .* of which the first is 1"),
        ("evaluate.passes.rows=[]", r"evaluate.passes.rows=\[\]: must be numbers in ascending order, each once"),
        ("evaluate.passes.rows=[1,2.5]", r"evaluate.passes.rows=\[1, 2.5\]: must be numbers"),
        ("evaluate.passes.rows=[1,true]", r"evaluate.passes.rows=\[1, True\]: must be numbers"),
        ("evaluate.passes.rows=null", "evaluate.passes.rows=null: must be numbers"),
        ("evaluate.passes.contexts=[]", r"evaluate.passes.contexts=\[\]: must be numbers from 1 on"),
        ("evaluate.passes.repetitions=1.5", "evaluate.passes.repetitions=1.5: must be at least 0"),
        ("evaluate.passes.rows=[1,4,2]", "ascending order, each once"),
        ("evaluate.passes.contexts=[0,16]", r"evaluate.passes.contexts=\[0, 16\]: must be numbers from 1 on"),
        ("evaluate.passes.contexts=[16,16]", "ascending order, each once"),
        ("evaluate.passes.repetitions=-1", r"evaluate.passes.repetitions=-1: must be at least 0 \(none\)"),
        ("evaluate.passes.contexts=[20000]", "none fits the model's context window of 16384 tokens"),
    ],
)
def test_wrong_values_are_refused(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = {"evaluate.passes.repetitions": "1", **dict([override.split("=")])}
    arguments = [f"{key}={value}" for key, value in chosen.items()]
    base = ["model=tiny", "threads=1", "verifier=fp16", "drafter=none", "data.limit=1", "hydra.run.dir=out"]
    monkeypatch.setattr("sys.argv", ["run.py", *base, *arguments])
    assert main() == 2
    assert re.search(message, capfd.readouterr().err)


def test_an_experiment_publishes_its_passes(published: Path) -> None:
    passes = read_rows(published / PASSES)
    arms = list(dict.fromkeys(passes["arm"]))
    assert arms == ["fp16", "int8, 8-bit head"]
    assert len(passes) == 2 * 2 * 3 * 3  # arms, contexts, rows, repetitions
    assert (passes[["pass_ms", "reference_ms", "weight_bytes"]] > 0).all(axis=None)
    assert set(passes["copy_bandwidth"]) == {1e10}
    text = (published / TABLE).read_text()
    spec = reproduction.load_experiment("memory_wall").publish
    assert set(spec.pass_tables) <= set(PASS_TABLES)
    for name in spec.pass_tables:
        assert f"## {PASS_TABLES[name].title}" in text
    assert "| int8, 8-bit head | 32 |" in text
    assert "percentile bootstrap over repetitions" in text
    found = speculations(pass_times(passes), read_rows(published / RESULTS))
    assert [entry.group.arm for entry in found] == arms
    for entry in found:
        assert entry.residual.value == pytest.approx(entry.measured.value / entry.predicted.value)


def test_what_is_declared_but_was_not_timed_is_a_shortcoming(published: Path) -> None:
    passes = read_rows(published / PASSES)
    assert pass_shortcomings(passes, PassesConfig([1, 2], [16, 32], 3)) == []
    assert pass_shortcomings(None, PassesConfig([1], [16], 0)) == []
    assert pass_shortcomings(None, PassesConfig([1], [16], 1)) == ["timed passes are declared, but there are none"]
    assert pass_shortcomings(passes, PassesConfig([1, 2, 4], [16, 64], 5)) == [
        "5 repetitions of every pass are declared, but there are 3",
        "no pass was timed for the declared rows 4",
        "no pass was timed for the declared contexts 64",
    ]


def test_redrawing_gives_the_same_bytes(published: Path) -> None:
    spec = reproduction.load_experiment("memory_wall").publish
    before = {file.name: file.read_bytes() for file in published.iterdir()}
    redraw(published, spec)
    assert {file.name: file.read_bytes() for file in published.iterdir()} == before
    assert {f"{name}.{form}" for name in spec.pass_figures for form in ("pdf", "svg", "png")} <= set(before)


Start = Callable[[], tuple[int, str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Start:
    """Start or continue a run that times four passes in the folder out; returns the exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    base = ["model=tiny", "threads=1", "verifier=fp16", "drafter=none", "data.limit=1", "decode.max_new_tokens=4"]
    passes = ["evaluate.passes={repetitions: 2, rows: [1, 2], contexts: [16]}"]
    monkeypatch.setattr("quasar_kernels.bandwidth.CopyBandwidth.measure", lambda _: 1e10)
    monkeypatch.setattr("sys.argv", ["run.py", *base, *passes, "hydra.run.dir=out"])

    def run() -> tuple[int, str]:
        capfd.readouterr()
        return main(), capfd.readouterr().err

    return run


def test_an_interrupted_run_continues_after_its_last_whole_pass(start: Start, tmp_path: Path) -> None:
    assert start()[0] == 0
    file = tmp_path / "out" / PASS_LINES
    whole = file.read_bytes().splitlines(keepends=True)
    assert len(whole) == 4
    names = {field.name for field in dataclasses.fields(PassRecord)}
    assert set(json.loads(whole[0])) == {"schema_version", "checksum", *names}
    file.write_bytes(b"".join(whole[:2]) + whole[2][:20])
    (tmp_path / "out" / "summary.json").unlink()
    assert start()[0] == 0
    continued = file.read_bytes().splitlines(keepends=True)
    assert continued[:2] == whole[:2]
    assert [_point(line) for line in continued] == [_point(line) for line in whole]
    assert [record.attempt for record in read_passes(tmp_path / "out")] == [1, 1, 2, 2]
    attempts = json.loads((tmp_path / "out" / "environment.json").read_text())["attempts"]
    assert [attempt["passes_done_before"] for attempt in attempts] == [0, 2]


DAMAGES: dict[str, tuple[Callable[[list[Json]], list[Json]], str]] = {
    "another schema": (lambda lines: [{**lines[0], "schema_version": 1}], "line 1: .*it has schema_version 1"),
    "a changed time": (
        lambda lines: [lines[0], {**lines[1], "pass_ms": 0.5}],
        "line 2: .*its checksum does not fit",
    ),
    "a lost time": (
        lambda lines: [{key: value for key, value in lines[0].items() if key != "pass_ms"}],
        "line 1: .*PassRecord lacks 'pass_ms'",
    ),
    "a duplicated line": (lambda lines: [*lines, lines[1]], "line 5: .*repetition 0, is also in line 2"),
    "another run's pass": (
        lambda lines: [lines[0], _resealed({**lines[1], "rows": 3})],
        "line 2: .*the pass of 3 rows behind 16 tokens, repetition 0, is not among those of this run",
    ),
}


@pytest.mark.parametrize("damage", fast(DAMAGES, "a changed time", "a duplicated line"))
def test_passes_are_validated_before_a_run_continues(start: Start, tmp_path: Path, damage: str) -> None:
    assert start()[0] == 0
    file = tmp_path / "out" / PASS_LINES
    change, message = DAMAGES[damage]
    lines = change([json.loads(line) for line in file.read_bytes().splitlines()])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = _contents(tmp_path / "out")
    code, err = start()
    assert code == 2
    assert re.search(f"passes.jsonl, {message}", err), err
    assert "generations.jsonl" not in err
    assert _contents(tmp_path / "out") == before


def test_passes_of_other_code_are_refused(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are compared although no prompt's record is left."""
    assert start()[0] == 0
    (tmp_path / "out" / "generations.jsonl").unlink()
    before = _contents(tmp_path / "out")
    monkeypatch.setattr("quasar.experiment.inputs.code_version", lambda: "another")
    code, err = start()
    assert (code, "the version of the code" in err) == (2, True), err
    assert _contents(tmp_path / "out") == before


def test_passes_without_a_configuration_are_refused(start: Start, tmp_path: Path) -> None:
    assert start()[0] == 0
    for name in ("config.yaml", "generations.jsonl"):
        (tmp_path / "out" / name).unlink()
    code, err = start()
    assert (code, "contains records but no config.yaml" in err) == (2, True), err


def test_a_pass_that_cannot_be_written_leaves_the_file_unchanged(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of the third line."""
    write, written = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal written
        if b"reference_ms" in data[:200]:
            written += 1
            if written == 3:
                write(descriptor, data[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr("os.write", full)
    code, err = start()
    assert (code, PASS_LINES in err) == (1, True), err
    lines = (tmp_path / "out" / PASS_LINES).read_bytes()
    assert len(lines.splitlines()) == len(read_passes(tmp_path / "out")) == 2
    assert lines.endswith(b"\n")
    monkeypatch.setattr("os.write", write)
    assert start()[0] == 0
    assert len(read_passes(tmp_path / "out")) == 4


def _resealed(record: Json) -> Json:
    return {**record, "checksum": checksum(record)}


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def _point(line: bytes) -> tuple[int, int, int]:
    record = json.loads(line)
    return record["context"], record["repetition"], record["rows"]
