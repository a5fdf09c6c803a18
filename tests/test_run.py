"""Whole runs as a user starts them: their output, their files and their exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quasar.cli import app
from quasar.experiment.main import main
from quasar.results.schema import SCHEMA_VERSION, VERSION_KEY

ROOT = Path(__file__).parents[1]
SUMMARY_KEYS = {
    *("model", "drafter", "verifier", "data", "temperature", "prompts", "tokens_generated", "tokens_per_second"),
    *("prefill_tokens_per_second", "mean_acceptance_length", "mean_acceptance_length_ref", "acceptance_rate"),
    *("acceptance_by_position", "draft_ms", "verify_ms", "overhead_ms", "step_ms", "speedup_vs_ar_same"),
    *("speedup_vs_ar_ref", "speedup_ci95", "kl_to_reference", "top1_agreement", "exact_match_to_self"),
    *("exact_match_to_reference", "weight_bytes", "bytes_per_step", "achieved_bandwidth_fraction"),
    *(
        "peak_memory_bytes",
        "device",
        "repetitions",
        "kv_bytes_per_token",
        "kl_noise_floor",
        "top1_noise_floor",
        "exact_match_length",
    ),
    *("distinct_4gram_ratio", "distinct_4gram_ratio_reference", "task_accuracy", "drafter_notes"),
    *("simulated", "lossy", "emulated", "disturbed", "model_origin", "weights_on_grid", "reference_text_speedup"),
    *("draft_weight_bytes", "memory_bound_speedup"),
    *("reference_text_speedup_ci95", "pass_cost", "predicted_speedup", "prediction_residual", "share_of_oracle"),
}


def command(*overrides: str) -> list[str]:
    model = [] if any(override.startswith("model=") for override in overrides) else ["model=tiny"]
    # One thread is used, because the operations of the tiny model are too small for several.
    return [sys.executable, str(ROOT / "run.py"), *overrides, *model, "threads=1"]


@dataclass
class Ended:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call ``run.py`` in this process, which saves the seconds that the imports take."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))

    def start(*overrides: str) -> Ended:
        monkeypatch.setattr(sys, "argv", command(*overrides)[1:])
        capfd.readouterr()
        code = main()
        return Ended(code, *capfd.readouterr())

    return start


def small(prompt_file: Path, folder: str = "out") -> list[str]:
    data = ["data=specbench", f"data.path={prompt_file}", "calibration.prompts=2", "calibration.max_tokens=40"]
    return [*data, "decode.max_new_tokens=24", f"hydra.run.dir={folder}"]


def records(tmp_path: Path, folder: str = "out") -> list[dict]:
    return [json.loads(line) for line in (tmp_path / folder / "generations.jsonl").read_text().splitlines()]


def untimed(answers: list[dict]) -> list[dict]:
    """Return the parts that are equal in two runs of one configuration."""
    return [{key: value for key, value in answer.items() if not key.endswith("_ms")} for answer in answers]


def test_stop_strings_end_answers_and_leave_fidelity_alone(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    plain = ["verifier=int8", "drafter=ngram", "verifier.dtype=float32"]
    assert run(*small(prompt_file, "whole"), *plain).returncode == 0
    whole = records(tmp_path, "whole")
    # A character that some answer holds and an override can: the tiny model writes any bytes.
    text = "".join(record["turns"][0]["text"][4:] for record in whole)
    stop = next(found for found in text if found.isprintable() and found not in "'\"\\$,:=[]{}()\ufffd ")
    assert run(*small(prompt_file), *plain, f"decode.stop=['{stop}']").returncode == 0
    for record, undisturbed in zip(records(tmp_path), whole, strict=True):
        turn, before = record["turns"][0], undisturbed["turns"][0]
        if stop in before["text"]:
            assert turn["finish_reason"] == "stop"
            assert stop in turn["text"]
            assert stop not in turn["text"][:-1]
            assert before["text"].startswith(turn["text"])
        else:
            assert turn["token_ids"] == before["token_ids"]
        assert untimed(record["fidelity"]) == untimed(undisturbed["fidelity"])


def test_typical_acceptance_is_labelled_lossy(run: Run, prompt_file: Path) -> None:
    done = run(*small(prompt_file), "verifier=int8", "drafter=ngram", "decode=sampling", "decode.acceptance=typical")
    assert done.returncode == 0, done.stderr
    assert "decode    typical acceptance: lossy" in done.stdout
    assert "(typical acceptance: lossy)" in done.stdout
    assert "The output is LOSSY" in done.stdout
    assert "lossless" not in done.stdout
    assert json.loads(Path("out/summary.json").read_text())["lossy"] is True


def test_drafters_that_ask_for_resources(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    """A chain of prompt lookup, a searched layer-skip in another precision, and a draft model, in one run."""
    members = (
        "drafter.members=[{name: ngram, n_min: 2}, "
        "{name: layerskip, method: search, draft_verifier: int8, num_tokens: 2, confidence: 0.9, search_sets: 2, "
        "search_prompts: 1, search_tokens: 4}, model]"
    )
    done = run(
        *small(prompt_file),
        "verifier=fp16",
        "drafter=chain",
        members,
        "evaluate.fidelity=false",
        "decode.draft_tokens=null",
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())["drafter"]
    assert facts[0].startswith("layerskip: skips layers [")
    assert facts[1].startswith("model: draft model of ")
    notes = json.loads((tmp_path / "out" / "summary.json").read_text())["drafter_notes"]["member"]
    assert set(notes) <= {"ngram", "layerskip", "model", "none"}
    assert f"layerskip: {notes['layerskip']['steps']} steps" in done.stdout
    pruned = run(
        *small(prompt_file, "draft"), "drafter=model", "verifier@drafter.draft=int4", "drafter.draft.method=rtn"
    )
    assert pruned.returncode == 0, pruned.stderr
    wrong = run(*small(prompt_file, "wrong"), "drafter=chain", "drafter.members=[ngrams]")
    assert wrong.returncode == 2
    assert "drafter 'ngrams' is not in conf/drafter; choose one of cascade, chain, " in wrong.stderr


def test_auto_draft_length_and_its_gain_are_recorded(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    done = run(*small(prompt_file), "verifier=fp16", "drafter=ngram", "decode.draft_tokens=auto")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    for steps in (turn["steps"] for record in records for turn in record["turns"]):
        assert len(steps["chosen_length"]) == len(steps["expected_gain"]) == len(steps["emitted"])
        assert all(depth <= chosen for depth, chosen in zip(steps["depth"], steps["chosen_length"], strict=True))
        assert min(steps["expected_gain"]) >= 1.0
    notes = json.loads((tmp_path / "out" / "summary.json").read_text())["drafter_notes"]
    assert f"Chosen length: {notes['chosen_length']:.2f} (mean over steps)." in done.stdout
    assert run(*small(prompt_file), "decode.draft_tokens=often").returncode == 2


def test_a_run_prints_its_table_and_leaves_its_files(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    done = run(*small(prompt_file), "verifier=int4", "drafter=ngram", "verifier.dtype=float32")
    assert done.returncode == 0, done.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout), "control characters in plain output"
    header = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:6])
    assert set(header) == {"model", "drafter", "verifier", "device", "prompts", "output"}
    assert "lossless with respect to the INT4 model" in header["verifier"]
    assert "The output is lossless with respect to the INT4 model only" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"acceptance=\d\.\d{3} \(\d+/\d+\) mean_len=\d\.\d\d per_pos=\((1\.00|\.\d\d)(,(1\.00|\.\d\d))*\)", last
    )

    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert summary["prompts"] == 3
    assert summary["exact_match_to_self"] == 1.0
    records = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [record["question_id"] for record in records] == ["1", "2", "3"]
    assert len(records[2]["turns"]) == 2
    forced = [answer for record in records for answer in record["fidelity"]]
    assert summary["reference_text_speedup"] == pytest.approx(
        sum(answer["ar_ref_ms"] for answer in forced) / sum(answer["forced_ms"] for answer in forced)
    )
    assert f"both decode the same tokens: {summary['reference_text_speedup']:.2f}x, 95 % interval" in done.stdout
    assert (summary["model_origin"], summary["weights_on_grid"]) == ("random weights, seed 0", None)
    plotted = CliRunner().invoke(app, ["plot", str(out)])
    assert plotted.exit_code == 0, plotted.output
    footer = re.sub(r"<[^>]*>|\s+", " ", (out / "figures" / "step.svg").read_text())
    assert re.search(r"tiny: +random +weights, +seed +0; +3 +prompts", footer)
    nothing = CliRunner().invoke(app, ["plot", str(prompt_file.parent / "out" / "figures")])
    assert nothing.exit_code == 2
    assert "contains no runs; pass a folder" in nothing.output
    turns = [turn for record in records for turn in record["turns"]]
    emitted = sum(sum(turn["steps"]["emitted"]) for turn in turns)
    steps = sum(len(turn["steps"]["emitted"]) for turn in turns)
    assert summary["tokens_generated"] == sum(len(turn["token_ids"]) for turn in turns) == emitted + len(turns)
    assert summary["mean_acceptance_length"] == pytest.approx(emitted / steps)
    drafted = sum(sum(turn["steps"]["drafted"]) for turn in turns)
    accepted = sum(sum(turn["steps"]["accepted"]) for turn in turns)
    assert last.startswith(
        f"acceptance={accepted / drafted:.3f} ({accepted}/{drafted}) mean_len={emitted / steps:.2f} "
    )
    decode_ms = sum(
        sum(turn["milliseconds"][phase]) for turn in turns for phase in ("draft", "verify", "overhead", "observe")
    )
    assert summary["tokens_per_second"] == pytest.approx(emitted / decode_ms * 1e3, rel=1e-3)
    assert summary["step_ms"] == pytest.approx(decode_ms / steps, rel=1e-3)

    status = json.loads((out / "status.json").read_text())
    assert (status["status"], status["error"]) == ("done", None)
    environment = json.loads((out / "environment.json").read_text())
    assert {
        "git_commit",
        "packages",
        "cpu",
        "threads",
        "copy_bandwidth_bytes_per_second",
        "model",
        "prompt_set",
    } <= set(environment)
    config = (out / "config.yaml").read_text()
    assert config.startswith(f"# config hash: {status['config_hash']}\n# command: ")
    assert "num_tokens: 5" in config


def test_second_turn_reads_the_models_own_reply(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    assert run(*small(prompt_file), "drafter=none", "verifier=fp16").returncode == 0
    first, second = json.loads((tmp_path / "out/generations.jsonl").read_text().splitlines()[2])["turns"]
    # The byte tokenizer counts: both turns, the reply between them, and the template's markers.
    reply = len(first["text"].encode())
    assert second["prompt_tokens"] == first["prompt_tokens"] + reply + len("and once more") + 4


def test_interrupted_run_continues_after_its_last_whole_line(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    whole = run(*small(prompt_file, "whole"))
    assert whole.returncode == 0, whole.stderr
    cut = tmp_path / "cut"
    cut.mkdir()
    for name in ("config.yaml", "environment.json"):
        (cut / name).write_text((tmp_path / "whole" / name).read_text())
    lines = (tmp_path / "whole/generations.jsonl").read_text().splitlines(keepends=True)
    (cut / "generations.jsonl").write_text(lines[0] + lines[1][:50])
    done = run(*small(prompt_file, "cut"))
    assert done.returncode == 0, done.stderr
    assert "1 already done" in done.stdout
    continued = [json.loads(line) for line in (cut / "generations.jsonl").read_text().splitlines()]
    original = [json.loads(line) for line in lines]
    assert continued[0] == original[0]
    tokens = [
        [[turn["token_ids"] for turn in record["turns"]] for record in records] for records in (continued, original)
    ]
    assert tokens[0] == tokens[1]


def test_folder_of_another_run_is_left_alone(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    assert run(*small(prompt_file)).returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    other = run(*small(prompt_file), "drafter=ngram")
    assert other.returncode == 2
    assert "contains a run with another configuration" in other.stderr
    again = run(*small(prompt_file), "resume=false")
    assert again.returncode == 2
    assert "already contains this run" in again.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_records_of_an_older_schema_are_refused_at_the_start(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    """A folder of a killed run of older code, without a schema version."""
    assert run(*small(prompt_file)).returncode == 0
    out, lines = tmp_path / "out", records(tmp_path)
    (out / "summary.json").unlink()
    (out / "status.json").write_text((out / "status.json").read_text().replace('"done"', '"running"'))
    unversioned = [{key: value for key, value in line.items() if key != VERSION_KEY} for line in lines]
    incomplete = [lines[0], {key: value for key, value in lines[1].items() if key != "family"}]
    older = [{**lines[0], VERSION_KEY: SCHEMA_VERSION - 1}]
    for content, line, found in (
        (unversioned, 1, "no schema_version, this code reads version"),
        (incomplete, 2, "PromptRecord lacks 'family'"),
        (older, 1, f"schema_version {SCHEMA_VERSION - 1}, this code reads version {SCHEMA_VERSION}"),
    ):
        (out / "generations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in content))
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        refused = run(*small(prompt_file))
        assert refused.returncode == 2
        assert f"{out / 'generations.jsonl'}, line {line}: " in refused.stderr
        assert found in refused.stderr
        assert "another hydra.run.dir" in refused.stderr
        assert refused.stdout == "", "the run began"
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["drafter=mindreader"], ["drafter/mindreader", "layerskip", "lookahead", "ngram", "none"]),
        (["verifier=int3"], ["verifier/int3", "fp16", "int4", "int8", "pruned"]),
        (["drafter=ngram", "drafter.num_tokns=3"], ["num_tokns"]),
        (["drafter=ngram", "drafter.num_tokens=-1"], ["drafter.num_tokens=-1", "conf/drafter/ngram.yaml"]),
        (["verifier=pruned", "verifier.ratio=1.2"], ["verifier.ratio=1.2"]),
        (["verifier=int4", "verifier.group_size=48"], ["verifier.group_size=48 does not divide 128", "32, 64, 128"]),
        (["drafter=layerskip", "drafter.skip_layers=[5]"], ["drafter.skip_layers names [5]", "0 to 3"]),
        (["model=path", "model.path=/nowhere"], ["model.path=/nowhere"]),
    ],
)
def test_wrong_requests_end_with_one_message_and_code_2(
    run: Run, overrides: list[str], words: list[str], prompt_file: Path, tmp_path: Path
) -> None:
    done = run(*small(prompt_file), *overrides)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_full_error_brings_the_traceback_back(run: Run, prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = run(*small(prompt_file), "drafter=ngram", "drafter.num_tokens=0")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_prompt_longer_than_the_context_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"question_id": 7, "category": "chat", "turns": ["x" * 20_000]}) + "\n")
    done = run(*small(file))
    assert done.returncode == 2
    assert "long.jsonl:1: question 7 has 20" in done.stderr
    assert "16384" in done.stderr


def test_interrupt_ends_with_130_and_keeps_the_records(prompt_file: Path, tmp_path: Path) -> None:
    overrides = [
        "data=specbench",
        f"data.path={prompt_file}",
        "decode.max_new_tokens=4000",
        "hydra.run.dir=out",
        "evaluate.baselines=false",
    ]
    process = subprocess.Popen(
        command(*overrides),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell inherits that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    generations = tmp_path / "out/generations.jsonl"
    deadline = time.time() + 240
    # The file is made before its first line is written.
    while not _lines(generations) and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads((tmp_path / "out/status.json").read_text())["status"] == "failed"
    assert [json.loads(line) for line in generations.read_text().splitlines()]


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_multirun_runs_every_combination(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    done = run("-m", "drafter=none,ngram", *small(prompt_file)[:-1], "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(file.read_text()) for file in sorted((tmp_path / "sweep").glob("*/summary.json"))]
    assert [summary["drafter"] for summary in summaries] == ["none", "ngram"]


def test_sampled_run_is_reproducible(run: Run, prompt_file: Path, tmp_path: Path) -> None:
    """With fixed draft lengths. Automatic ones follow measured times, and rejection sampling draws by the draft."""
    fixed = ["drafter=ngram", "decode.draft_tokens=3", "decode=sampling", "verifier.dtype=float32"]
    for folder in ("a", "b"):
        assert run(*small(prompt_file, folder), *fixed).returncode == 0
    texts = [
        [
            [turn["text"] for turn in json.loads(line)["turns"]]
            for line in (tmp_path / folder / "generations.jsonl").open()
        ]
        for folder in ("a", "b")
    ]
    assert texts[0] == texts[1]


def test_help_answers_without_loading_torch(run: Run, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "run.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "drafter: cascade, chain, layerskip, lookahead, lookahead_paper, " in done.stdout
    assert " torch\n" not in done.stderr
