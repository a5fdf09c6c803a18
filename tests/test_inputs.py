"""Files that users name other than prompts: texts, traces, copies of benchmarks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quasar.config.inputs import json_lines, read_text
from quasar.config.schema import CalibrationConfig
from quasar.errors import RequestError
from quasar.evaluation.calibration import calibration_prompts
from quasar.evaluation.prompts import load_prompts
from quasar.results.generations import GenerationsFile
from quasar.results.trace import read_trace
from tests.compose import composed_run


def test_texts_are_utf8_files(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\xc2\x85")
    assert read_text(file) == "one\r\ntwo\x85"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match=r"corpus\.txt: cannot be read as UTF-8 text \(byte 0xe9 after 3 bytes\)"):
        read_text(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="is a pipe"):
        read_text(tmp_path / "pipe")


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.config.inputs.LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text("[]\n" + "x" * 101)
    with pytest.raises(RequestError, match=r"a\.jsonl:2: the line is longer"):
        list(json_lines(tmp_path / "a.jsonl"))


def test_calibration_text_is_read_like_prompts(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_bytes('\ufeff{"question_id": 1, "turns": ["a\u2028b\x85c"]}\n'.encode())
    (prompt,) = calibration_prompts(CalibrationConfig(path=str(file), prompts=4, max_tokens=9, seed=0))
    assert prompt.turns == ("a\u2028b\x85c",)
    file.write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(RequestError, match="compressed with gzip"):
        calibration_prompts(CalibrationConfig(path=str(file), prompts=4, max_tokens=9, seed=0))


def test_traces_are_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="is a pipe"):
        read_trace(tmp_path / "pipe")
    with pytest.raises(RequestError, match="is a folder"):
        read_trace(tmp_path)
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(RequestError, match=r"deep\.jsonl, line 1: .*damaged"):
        read_trace(tmp_path / "deep.jsonl")
    assert GenerationsFile(tmp_path / "missing").read_on() == []


ROW = {"question": "How many\u2028are\x85two?", "answer": "#### 2"}


def test_copies_of_benchmarks_are_read_like_prompts(tmp_path: Path) -> None:
    file = tmp_path / "copy.jsonl"
    data = composed_run("data=gsm8k", f"data.path={file}").data
    file.write_text("\ufeff" + json.dumps(ROW, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [prompt.turns for prompt in load_prompts(data)] == [(ROW["question"],)]
    for content, message in {
        json.dumps({**ROW, "answer": 2}): r"copy\.jsonl:1: the column answer must be a text, found 2",
        json.dumps({**ROW, "question": None}): r"copy\.jsonl:1: the column question must be a text, found None",
        f"{json.dumps(ROW)}\n[]": r"copy\.jsonl:2: must be a JSON object",
        "[" * 200_000: r"copy\.jsonl:1: is nested too deeply",
        "": "contain no prompt",
    }.items():
        file.write_text(content)
        with pytest.raises(RequestError, match=message):
            load_prompts(data)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RequestError, match="is a pipe"):
        load_prompts(data)


def test_an_array_of_rows_is_a_copy_too(tmp_path: Path) -> None:
    file = tmp_path / "copy.json"
    data = composed_run("data=gsm8k", f"data.path={file}").data
    file.write_text(json.dumps([ROW, ROW], indent=1))
    assert [prompt.place for prompt in load_prompts(data)] == [f"{file}:0", f"{file}:1"]
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n")
    assert [prompt.place for prompt in load_prompts(data)] == [f"{file}:1", f"{file}:2"]


def test_companions_in_a_copied_folder_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "._test.jsonl").write_bytes(b"\x00\x05\x16\x07" + bytes(90))
    assert len(load_prompts(composed_run("data=gsm8k", f"data.path={tmp_path}").data)) == 1
