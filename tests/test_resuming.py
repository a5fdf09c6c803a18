"""Runs that are continued: equal inputs only, records as they were written, and drafts as in an undisturbed run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quasar.results.schema import checksum
from tests.in_process import starter

Run = Callable[..., tuple[int, str, str]]
TURNS = ["one two one two one", "say it again", "one two one two one two", "and once more one two"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    write(file, TURNS)
    return file


def write(file: Path, turns: list[str]) -> None:
    lines = [{"question_id": number, "category": "chat", "turns": [turn]} for number, turn in enumerate(turns)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    start = starter(tmp_path, prompts, monkeypatch, capfd, tokens=12)
    return lambda *overrides, folder="hydra.run.dir=out": start(*overrides, folder)


def interrupt(folder: Path, finished: int) -> None:
    """Leave a finished run as if it had been killed after some prompts."""
    (folder / "summary.json").unlink()
    status = folder / "status.json"
    status.write_text(status.read_text().replace('"done"', '"running"'))
    lines = (folder / "generations.jsonl").read_text().splitlines(keepends=True)
    (folder / "generations.jsonl").write_text("".join(lines[:finished]))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("finished", [2, None])
@pytest.mark.parametrize(
    ("turns", "named"), [([*TURNS[:3], "an edited prompt"], "prompts (3)"), (TURNS[:3], "prompts (3)")]
)
def test_edited_prompts_are_refused_and_nothing_is_changed(
    run: Run, prompts: Path, tmp_path: Path, turns: list[str], named: str, finished: int | None
) -> None:
    assert run()[0] == 0
    if finished is not None:
        interrupt(tmp_path / "out", finished)
    before = contents(tmp_path / "out")
    write(prompts, turns)
    code, _, err = run()
    assert code == 2
    assert f"a difference in {named}" in err
    assert "choose another hydra.run.dir" in err
    assert contents(tmp_path / "out") == before
    write(prompts, TURNS)
    assert run()[0] == 0
    assert len(records(tmp_path / "out")) == len(TURNS)


def checkpoint(folder: Path) -> Path:
    """A folder of a model, as `model.path` takes it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "say", "it", "again"])}
    model = tokenizers.models.WordLevel({**words, "one": 40, "two": 41}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="</s>")
    wrapped.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_edited_model_files_are_refused(run: Run, tmp_path: Path, file: str) -> None:
    folder = checkpoint(tmp_path / "model")
    chosen = ["model=path", f"model.path={folder}"]
    assert run(*chosen)[0] == 0
    interrupt(tmp_path / "out", 2)
    if file == "model.safetensors":
        tensors = load_file(folder / file)
        tensors["model.norm.weight"] += 0.5
        save_file(tensors, folder / file, metadata={"format": "pt"})
    else:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "note": "edited"}))
    code, _, err = run(*chosen)
    assert (code, f"files of the model ({file})" in err) == (2, True), err


def test_edited_calibration_text_is_refused(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "calibration.jsonl"
    write(text, ["a text that statistics are measured on", "another one of these texts"])
    chosen = ["verifier=int8", f"calibration.path={text}", "calibration.prompts=2"]
    assert run(*chosen)[0] == 0
    interrupt(tmp_path / "out", 2)
    write(text, ["a text that statistics are measured on", "quite another text than before"])
    code, _, err = run(*chosen)
    assert (code, "the calibration text" in err) == (2, True), err


def test_an_edited_corpus_is_refused(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("one two three one two")
    chosen = ["drafter=suffix_automaton", "drafter.scope=corpus", f"drafter.corpus={text}"]
    assert run(*chosen)[0] == 0
    interrupt(tmp_path / "out", 2)
    text.write_text("two one three")
    code, _, err = run(*chosen)
    assert (code, "files that the configuration names (drafter.corpus)" in err) == (2, True), err


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("quasar.experiment.inputs.code_version", "the version of the code"),
        ("quasar.experiment.environment.device_identity", "the level of its kernels"),
    ],
)
def test_other_code_and_other_kernels_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    assert run()[0] == 0
    interrupt(tmp_path / "out", 2)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(place, lambda *_: "another")
    code, _, err = run()
    assert (code, words in err, "another now" in err) == (2, True, True), err
    assert contents(tmp_path / "out") == before


def test_every_attempt_is_recorded_and_none_is_overwritten(run: Run, tmp_path: Path) -> None:
    assert run()[0] == 0
    first = json.loads((tmp_path / "out/environment.json").read_text())
    interrupt(tmp_path / "out", 3)
    code, out, _ = run()
    assert code == 0
    assert "The prompts were decoded in 2 attempts" in out
    second = json.loads((tmp_path / "out/environment.json").read_text())
    assert second["attempts"][0] == first["attempts"][0]
    assert [attempt["prompts_done_before"] for attempt in second["attempts"]] == [0, 3]
    assert {key: value for key, value in second.items() if key != "attempts"} == {
        key: value for key, value in first.items() if key != "attempts"
    }
    assert [record["attempt"] for record in records(tmp_path / "out")] == [1, 1, 1, 2]


def resealed(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "checksum": checksum(record)}


DAMAGES: dict[str, tuple[Callable[[list[dict[str, Any]]], list[dict[str, Any]]], str]] = {
    "a duplicated line": (lambda lines: [lines[0], *lines], "line 2: .*question_id '0' is also in line 1"),
    "an alien id": (
        lambda lines: [resealed({**lines[0], "question_id": "7"}), *lines[1:]],
        "line 1: .*question_id '7' is not among the prompts",
    ),
    "no turns": (lambda lines: [lines[0], resealed({**lines[1], "turns": []})], "line 2: .*has no turns"),
    "a changed token": (
        lambda lines: [
            lines[0],
            {**lines[1], "turns": [{**lines[1]["turns"][0], "token_ids": [0, *lines[1]["turns"][0]["token_ids"][1:]]}]},
        ],
        "line 2: .*its checksum does not fit",
    ),
    "a missing token": (
        lambda lines: [
            resealed({**lines[0], "turns": [{**lines[0]["turns"][0], "token_ids": [1]}]}),
            *lines[1:],
        ],
        "line 1: .*other tokens than its steps emitted",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_records_are_validated_on_recovery(run: Run, tmp_path: Path, damage: str) -> None:
    assert run()[0] == 0
    interrupt(tmp_path / "out", 2)
    change, message = DAMAGES[damage]
    lines = change(records(tmp_path / "out"))
    (tmp_path / "out/generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = contents(tmp_path / "out")
    code, _, err = run()
    assert code == 2
    (line,) = err.strip().splitlines()
    assert re.search(message, line), line
    assert contents(tmp_path / "out") == before


def test_a_damaged_line_before_others_is_refused(run: Run, tmp_path: Path) -> None:
    """A crash cuts the last line only, so the lines behind a damaged one would be lost without a word."""
    assert run()[0] == 0
    interrupt(tmp_path / "out", 3)
    file = tmp_path / "out/generations.jsonl"
    file.write_bytes(file.read_bytes().replace(b'{"schema', b'{schema"', 1))
    before = file.read_bytes()
    code, _, err = run()
    assert (code, "line 1: " in err, "other lines follow it" in err) == (2, True, True), err
    assert file.read_bytes() == before


def test_records_without_a_configuration_are_refused(run: Run, tmp_path: Path) -> None:
    assert run()[0] == 0
    (tmp_path / "out/config.yaml").unlink()
    code, _, err = run()
    assert (code, "contains records but no config.yaml" in err) == (2, True), err


SESSION = ["drafter=suffix_automaton", "drafter.scope=session", "verifier.dtype=float32", "decode.draft_tokens=null"]


@pytest.mark.parametrize("fidelity", ["false", "true"])
@pytest.mark.parametrize("around", [None, "chain", "cascade"])
def test_a_continued_session_drafts_like_an_undisturbed_one(
    run: Run, tmp_path: Path, fidelity: str, around: str | None
) -> None:
    chosen = SESSION
    member = "{name: suffix_automaton, scope: session}"
    if around == "chain":
        chosen = ["drafter=chain", f"drafter.members=[{member}]", *SESSION[2:]]
    if around == "cascade":
        inner = "drafter.inner={name: int8, method: rtn}"
        fixed = ["drafter.block=4", *SESSION[2:]]
        chosen = ["drafter=cascade", inner, f"drafter.inner_drafter={member}", *fixed]
    chosen = [*chosen, f"evaluate.fidelity={fidelity}"]
    assert run(*chosen)[0] == 0
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    interrupt(tmp_path / "out", 2)
    assert run(*chosen)[0] == 0
    for before, after in zip(records(tmp_path / "whole"), records(tmp_path / "out"), strict=True):
        assert [turn["steps"] for turn in before["turns"]] == [turn["steps"] for turn in after["turns"]]
        assert [answer["emitted"] for answer in before["fidelity"]] == [
            answer["emitted"] for answer in after["fidelity"]
        ]


def test_the_warm_up_does_not_enter_the_session(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from quasar.drafters._suffix_automaton import AutomatonIndex

    memories: list[int] = []
    begin = AutomatonIndex.begin

    def noted(index: AutomatonIndex, prompt: list[int]) -> None:
        begin(index, prompt)
        memories.append(len(index._memory.tokens))

    monkeypatch.setattr(AutomatonIndex, "begin", noted)
    assert run(*SESSION)[0] == 0
    # The warm-up, then the prompts: the first of them finds an empty memory.
    assert memories[1] == 0
    assert memories[2] > 0


@pytest.mark.parametrize(
    "chosen",
    [
        ["drafter=ngram", "decode.draft_tokens=auto"],
        ["drafter=cascade", "drafter.inner={name: int8, method: rtn}"],
    ],
    ids=["lengths", "blocks"],
)
def test_automatic_lengths_of_several_attempts_are_named(run: Run, tmp_path: Path, chosen: list[str]) -> None:
    assert run(*chosen)[0] == 0
    interrupt(tmp_path / "out", 2)
    code, out, _ = run(*chosen)
    assert code == 0
    assert "the estimates behind automatic lengths" in out


def test_a_line_break_in_the_command_leaves_a_readable_config(run: Run, tmp_path: Path) -> None:
    from quasar.results.runs import read_run

    assert run('decode.stop=["a\n\u2028b"]')[0] == 0
    assert read_run(tmp_path / "out").status == "done"
