"""The cache: its entries are keyed by all they depend on, checked when read, and computed again if invalid."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quasar import cache
from quasar.cache import Store, card_of, json_store
from quasar.cli import app
from quasar.model.sources import Checkpoint

CPU = torch.device("cpu")
ANSWERS: Store[list[int]] = json_store("answers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


class Counting:
    """Returns how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> list[int]:
        self.calls += 1
        return [self.calls]


def test_a_value_is_made_once_per_key_device_dtype_torch_and_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Counting()

    def get(key: str = "a", dtype: torch.dtype = torch.float32) -> list[int]:
        return ANSWERS.get({"model": key}, CPU, dtype, make)

    assert get() == get() == [1]
    assert get("b") == [2]
    assert get(dtype=torch.bfloat16) == [3]
    monkeypatch.setattr("quasar.cache.device_identity", lambda device: "another CPU")
    assert get() == [4]
    monkeypatch.setattr("quasar.cache.code_version", lambda: "0123456789ab")
    assert get() == [5]
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.99")
    assert get() == [6]
    assert get() == [6]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "card", "card of another key", "no card"])
def test_a_damaged_entry_is_made_anew_with_one_warning(folder: Path, damage: str) -> None:
    make = Counting()
    assert ANSWERS.get({}, CPU, torch.float32, make) == [1]
    (content,) = folder.glob("answers/*.json")
    card = card_of(content)
    if damage == "flipped":
        content.write_text("[7]\n")  # a value that would load
    elif damage == "cut":
        content.write_bytes(content.read_bytes()[:1])
    elif damage == "empty":
        content.write_text("")
    elif damage == "card":
        card.write_text("{")
    elif damage == "card of another key":
        card.write_text(json.dumps({**json.loads(card.read_text()), "key": {"model": "other"}}))
    else:
        card.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ANSWERS.get({}, CPU, torch.float32, make) == [2]
        assert ANSWERS.get({}, CPU, torch.float32, make) == [2]
    named = [str(warning.message) for warning in caught]
    # If there is no card, the process died before the entry was complete, which is no error.
    assert len(named) == (0 if damage == "no card" else 1)
    assert all(str(content) in message for message in named)


def test_a_folder_that_takes_nothing_costs_the_cache_and_not_the_run(folder: Path) -> None:
    folder.write_text("in the way")
    make = Counting()
    with pytest.warns(RuntimeWarning, match="is not writable"):
        assert ANSWERS.get({}, CPU, torch.float32, make) == [1]


def test_what_cannot_be_made_leaves_nothing(folder: Path) -> None:
    def fail() -> list[int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ANSWERS.get({}, CPU, torch.float32, fail)
    assert not list(folder.glob("answers/*.json"))
    assert ANSWERS.get({}, CPU, torch.float32, Counting()) == [1]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_an_edited_file_makes_another_model(tmp_path: Path, file: str) -> None:
    """An edited RoPE base or stop token must not find answers that the old one gave."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    before = Checkpoint("model", tmp_path, "here").identity
    (tmp_path / file).write_text('{"rope_theta": 1}')
    assert Checkpoint("model", tmp_path, "here").identity != before


def test_the_command_lists_sizes_and_clears_by_kind(folder: Path) -> None:
    other = json_store("others")
    for store in (ANSWERS, other):
        store.get({}, CPU, torch.float32, Counting())
    listed = CliRunner().invoke(app, ["cache", "list"]).output
    assert re.findall(r"(answers|others)\W+(\d+)", listed) == [("answers", "1"), ("others", "1")]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert int(CliRunner().invoke(app, ["cache", "size"]).output) == size
    refused = CliRunner().invoke(app, ["cache", "clear", "nothing"])
    assert refused.exit_code == 2
    assert "answers, others" in refused.output
    assert CliRunner().invoke(app, ["cache", "clear", "answers"]).exit_code == 0
    assert not any(folder.glob("answers/*"))
    assert any(folder.glob("others/*.json"))
    assert CliRunner().invoke(app, ["cache", "clear"]).exit_code == 0
    assert cache.kinds() == [cache.Kind("answers", 0, 0), cache.Kind("others", 0, 0)]


@pytest.mark.skipif(os.name != "posix", reason="locks of this kind")
def test_clearing_leaves_what_a_process_is_making(folder: Path) -> None:
    def clear_meanwhile() -> list[int]:
        cache.clear()
        return [1]

    assert ANSWERS.get({}, CPU, torch.float32, clear_meanwhile) == [1]
    assert ANSWERS.get({}, CPU, torch.float32, Counting()) == [1]
