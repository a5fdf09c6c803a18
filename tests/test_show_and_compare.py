"""`quasar show` prints a run from its files, and `quasar compare` pairs the prompts of several runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from quasar.cli import app
from quasar.results.measured import Measured
from quasar.results.metrics import compute, summary_of
from quasar.results.schema import Milliseconds, PromptRecord
from quasar.results.store import RunFolder
from tests.compose import composed
from tests.in_process import starter
from tests.records import environment, facts, turn


def stored(folder: Path, accepted: list[int], verify_ms: list[float], *overrides: str, prompts: int = 0) -> Path:
    """Write a run: prompt q has three steps of 5 draft tokens, of which accepted[q] are accepted in each.

    verify_ms: time of each prompt's verification passes; a step takes 3 ms more. prompts: finished ones; 0: all
    """
    described = environment(len(accepted))
    header = {"model": "tiny, random weights", "prompts": f"{len(accepted)} from data=builtin"}
    described = replace(described, header=header, warnings=["on a grid"], facts=asdict(facts()))
    run = RunFolder(folder, composed("model=tiny", *overrides), resume=True)
    run.begin(["run.py"], described)
    records = []
    for number, (count, milliseconds) in enumerate(zip(accepted, verify_ms, strict=True), start=1):
        laps = [1.0] * 3
        times = Milliseconds([2.0], laps, [milliseconds] * 3, laps, laps)
        family = "math" if number % 2 else "chat"
        records.append(PromptRecord(str(number), family, [turn([5] * 3, [count] * 3, milliseconds=times)]))
    for record in records[: prompts or None]:
        run.append(record)
    if not prompts:
        run.finish(summary_of(compute(Measured(records, facts()))))
    run._lock.release()
    return folder


def quasar(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.output


def cells(output: str, name: str) -> list[str]:
    return next([c.strip() for c in line.split("|")[1:-1]] for line in output.splitlines() if f"| {name} " in line)


def test_a_finished_run_is_shown_as_it_was_printed(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = starter(tmp_path, prompt_file, monkeypatch, capfd, tokens=12)
    code, printed, _ = run("drafter=ngram", "verifier=int8", "verifier.method=rtn", "hydra.run.dir=out")
    assert code == 0
    monkeypatch.setattr("quasar.model.loading.random_transformer", None)
    code, shown = quasar("show", tmp_path / "out")
    assert code == 0, shown
    lines = [line for line in printed.splitlines() if line and not line.startswith(("wrote", "output", "decoding"))]
    begin = next(index for index, line in enumerate(lines) if line.startswith("model "))
    missing = [line for line in lines[begin:] if line not in shown.splitlines()]
    assert missing == []
    assert "state     done, 3 of 3 prompts" in shown
    assert "decode.max_new_tokens        12" in shown
    assert "calibration.path             null" in shown


def test_an_unfinished_run_is_shown_with_what_it_has(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a", [2, 1, 0], [4.0, 4.0, 4.0], prompts=2)
    code, shown = quasar("show", folder)
    assert code == 0, shown
    assert "state    partial, 2 of 3 prompts: ended without an error: killed, or its machine failed" in shown
    assert "warning: on a grid" in shown
    # The two finished prompts emit 9 and 6 tokens in three steps of 7 ms each.
    assert cells(shown, "all")[1:5] == ["2", "17", f"{15 / 42e-3:.1f}", "2.50"]
    nothing = stored(tmp_path / "b", [2], [4.0], prompts=1)
    (nothing / "generations.jsonl").unlink()
    assert "state    partial, 0 of 1 prompts" in quasar("show", nothing)[1]


def test_what_is_no_run_of_this_version_is_refused(tmp_path: Path) -> None:
    code, message = quasar("show", tmp_path)
    assert (code, "contains no run" in message) == (2, True)
    assert quasar("show", tmp_path / "nowhere")[0] == 2
    folder = stored(tmp_path / "a", [2, 1], [4.0, 4.0])
    content = json.loads((folder / "environment.json").read_text())
    for change, words in (({"facts": {"model": "x"}}, "facts of another version"), ({"header": None}, None)):
        changed = {key: value for key, value in {**content, **change}.items() if value is not None}
        (folder / "environment.json").write_text(json.dumps(changed))
        code, message = quasar("show", folder)
        assert code == 2
        assert (words or "lacks header") in message


def test_differences_are_those_of_the_totals_with_intervals_of_the_pairs(tmp_path: Path) -> None:
    accepted, slower = [3, 1, 4, 2, 0, 2], [9.0, 5.0, 12.0, 7.0, 6.0, 10.0]
    first = stored(tmp_path / "a", accepted, slower)
    # Every prompt is 1 ms per pass faster; its acceptance differs by +1, 0 and -1.
    second = stored(tmp_path / "b", [4, 1, 3, 3, 0, 2], [time - 1 for time in slower], "verifier=int8")
    code, output = quasar("compare", first, second)
    assert code == 0, output
    # 12 accepted and 18 emitted in 6 steps of one prompt each, by counting: (12 + 6) / 6 and (13 + 6) / 6.
    assert cells(output, "τ")[1:4] == ["3.00", "3.17", "+0.17"]
    assert cells(output, "accepted")[1:4] == [f"{12 / 30:.3f}", f"{13 / 30:.3f}", f"+{1 / 30:.3f}"]
    step = np.mean(slower) + 3
    assert cells(output, "step ms")[1:4] == [f"{step:.2f}", f"{step - 1:.2f}", "-1.00"]
    assert cells(output, "verify ms")[3:] == ["-1.00", "-"], "the same for every pair, so that no resample differs"
    per_token = [step * 6 / 18, (step - 1) * 6 / 19]
    assert cells(output, "ms per token")[1:4] == [
        *(f"{value:.2f}" for value in per_token),
        f"-{per_token[0] - per_token[1]:.2f}",
    ]
    assert cells(output, "tokens/s")[3] == f"+{1e3 / per_token[1] - 1e3 / per_token[0]:.1f}"
    low, high = cells(output, "τ")[4].split(" to ")
    assert float(low) < 0 < float(high)
    assert "*" not in high
    assert "Prompts that both runs have decoded: 6, in 1 repetitions." in output
    assert not any(f"| {name} " in output for name in ("τ_ref", "KL", "accuracy")), "neither run has measured these"


def test_pairing_finds_a_difference_that_separate_intervals_hide(tmp_path: Path) -> None:
    """Prompts differ by a factor of ten, and the second run is faster by 8 to 12 % on each."""
    generator = np.random.default_rng(0)
    slower = np.geomspace(10, 100, 12)
    faster = slower * generator.uniform(0.88, 0.92, 12)
    first = stored(tmp_path / "a", [1] * 12, list(slower))
    second = stored(tmp_path / "b", [1] * 12, list(faster), "verifier=int8")
    code, output = quasar("compare", first, second)
    assert code == 0, output
    value, interval = float(cells(output, "verify ms")[3]), cells(output, "verify ms")[4]
    assert value == pytest.approx(float(np.mean(faster - slower)), abs=0.006)
    low, high = (float(bound) for bound in interval.removesuffix("*").split(" to "))
    assert low < value < high < 0
    assert interval.endswith("*")


def test_runs_are_paired_by_the_prompts_that_both_have_finished(tmp_path: Path) -> None:
    first = stored(tmp_path / "a", [1, 1, 1], [4.0] * 3)
    second = stored(tmp_path / "b", [2, 2, 4], [4.0] * 3, "verifier=int8", prompts=2)
    code, output = quasar("compare", first, second)
    assert code == 0, output
    assert "Prompts that both runs have decoded: 2" in output
    assert cells(output, "τ")[1:4] == ["2.00", "3.00", "+1.00"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decode.max_new_tokens=7", "decode.max_new_tokens=64 and 7"),
        ("decode.temperature=0.5", "decode.temperature=0.0 and 0.5"),
        ("decode.stop=[end]", "decode.stop=[] and ['end']"),
    ],
)
def test_other_decode_settings_are_refused(tmp_path: Path, override: str, words: str) -> None:
    runs = [stored(tmp_path / "a", [1, 1], [4.0] * 2), stored(tmp_path / "b", [1, 1], [4.0] * 2, override)]
    code, message = quasar("compare", *runs)
    assert code == 2
    assert words in message


def test_other_prompts_and_models_are_refused(tmp_path: Path) -> None:
    first, second = (stored(tmp_path / name, [1, 1], [4.0] * 2) for name in "ab")
    content = json.loads((second / "environment.json").read_text())

    def refused(**inputs: object) -> str:
        changed = {**content, "inputs": {**content["inputs"], **inputs}}
        (second / "environment.json").write_text(json.dumps(changed))
        code, message = quasar("compare", first, second)
        assert code == 2
        return message

    assert "the text of 1 prompts differs (2)" in refused(prompts={"1": "hash", "2": "other"})
    assert "2 prompts are in only one of them (2, 3)" in refused(prompts={"1": "hash", "3": "hash"})
    assert "different models" in refused(model={"weights": "other"})
    code, message = quasar("compare", first)
    assert (code, "pass two runs or more" in message) == (2, True)


def test_other_machines_and_codes_are_said(tmp_path: Path) -> None:
    first, second = (stored(tmp_path / name, [1, 2], [4.0, 5.0]) for name in "ab")
    content = json.loads((second / "environment.json").read_text())
    content |= {"threads": 4, "inputs": {**content["inputs"], "code_version": "newer"}}
    (second / "environment.json").write_text(json.dumps(content))
    code, output = quasar("compare", first, second)
    assert code == 0, output
    assert "1 threads;" in output
    assert "4 threads): compare acceptance, not times" in output
    assert "other versions of the code (code, newer)" in output
