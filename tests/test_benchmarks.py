"""Benchmarks of the Hugging Face hub: local copies with the datasets' own columns, and what happens offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from datasets import load_dataset

from quasar.config.schema import DataConfig
from quasar.errors import RequestError
from quasar.evaluation.accuracy import graded
from quasar.evaluation.prompts import Prompt, load_prompts, prompt_set_hash
from tests.compose import composed_run

ROOT = Path(__file__).parents[1]

ROWS: dict[str, list[dict]] = {
    "mt_bench": [
        {"category": "writing", "prompt": ["Write.", "Shorten it."], "prompt_id": 31912571, "reference": []},
        {"category": "math", "prompt": ["1 + 1?", "2 + 2?"], "prompt_id": 7, "reference": ["It is 2.", "It is 4."]},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'from typing import List\n\n\ndef total(x: List[int]) -> int:\n    """The sum.\n    """\n',
            "canonical_solution": "    return sum(x)\n",
            "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n",
            "entry_point": "total",
        },
        {
            "task_id": "HumanEval/1",
            "prompt": "\n\ndef encode(s: str):\n    return s[::-1]\n\n\ndef decode(s: str):\n    '''Undo encode.'''\n",
            "canonical_solution": "    return encode(s)\n",
            "test": "def check(candidate):\n    assert candidate(encode('abc')) == 'abc'\n",
            "entry_point": "decode",
        },
    ],
    "gsm8k": [
        {"question": "How many are 6 times 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
        {"question": "And 1,000 plus 1?", "answer": "It is 1,001.\n#### 1,001"},
    ],
    "alpaca": [
        {"instruction": "Name a color.", "input": "", "output": "Red.", "text": "Below is ..."},
        {"instruction": "Convert to ASCII.", "input": "1000001", "output": "A", "text": "Below is ..."},
    ],
    "cnn_dm": [
        {"article": "A long story.", "highlights": "Short .\nStory .", "id": "f001ec5c"},
        {"article": "Another story.", "highlights": "Another .", "id": "00a665151b"},
    ],
}
TURNS = {
    "mt_bench": [("Write.", "Shorten it."), ("1 + 1?", "2 + 2?")],
    "humaneval": [
        ("Complete the code I provided.\n\n" + ROWS["humaneval"][0]["prompt"],),
        ("Complete the code I provided.\n\n" + ROWS["humaneval"][1]["prompt"][2:],),
    ],
    "gsm8k": [("How many are 6 times 7?",), ("And 1,000 plus 1?",)],
    "alpaca": [("Name a color.",), ("Convert to ASCII.\n\n1000001",)],
    "cnn_dm": [("Summarize: A long story.",), ("Summarize: Another story.",)],
}
REFERENCES = {
    "mt_bench": [(), ("It is 2.", "It is 4.")],
    "humaneval": [("    return sum(x)\n",), ("    return encode(s)\n",)],
    "gsm8k": [("6 * 7 = <<6*7=42>>42\n#### 42",), ("It is 1,001.\n#### 1,001",)],
    "alpaca": [("Red.",), ("A",)],
    "cnn_dm": [("Short .\nStory .",), ("Another .",)],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets` is offline and its cache is empty."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def jsonl(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def benchmark(name: str, *overrides: str) -> DataConfig:
    return composed_run(f"data={name}", *overrides).data


def loaded(name: str, path: Path, *overrides: str) -> list[Prompt]:
    return load_prompts(benchmark(name, f"data.path={path}", *overrides))


@pytest.mark.parametrize("name", sorted(ROWS))
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_become_prompts(name: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"copy.{suffix}"
    if suffix == "jsonl":
        jsonl(file, ROWS[name])
    else:
        pd.DataFrame(ROWS[name]).to_parquet(file)
    prompts = loaded(name, file)
    assert [prompt.key for prompt in prompts] == [f"{name}/0", f"{name}/1"]
    assert [prompt.family for prompt in prompts] == [name, name]
    assert [prompt.turns for prompt in prompts] == TURNS[name]
    assert [prompt.reference for prompt in prompts] == REFERENCES[name]
    # The second line of a JSONL file, and row 1 (from 0) of a parquet file.
    assert prompts[1].place == f"{file}:{2 if suffix == 'jsonl' else 1}"


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_first_eighty_rows_are_taken(name: str, tmp_path: Path) -> None:
    rows = ROWS[name] * 41
    file = jsonl(tmp_path / "copy.jsonl", rows)
    assert [prompt.key for prompt in loaded(name, file)] == [f"{name}/{number}" for number in range(80)]
    assert [prompt.turns for prompt in loaded(name, file, "data.limit=3")] == (TURNS[name] * 2)[:3]
    assert len(loaded(name, file, "data.limit=null")) == 82


def test_revisions_are_commits() -> None:
    sources = {name: benchmark(name).hub for name in ROWS}
    assert {name: (hub.repo, hub.subset, hub.split) for name, hub in sources.items()} == {
        "mt_bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
        "humaneval": ("openai/openai_humaneval", "openai_humaneval", "test"),
        "gsm8k": ("openai/gsm8k", "main", "test"),
        "alpaca": ("tatsu-lab/alpaca", None, "train"),
        "cnn_dm": ("abisee/cnn_dailymail", "3.0.0", "test"),
    }
    assert all(len(hub.revision) == 40 and set(hub.revision) <= set("0123456789abcdef") for hub in sources.values())


def test_a_folder_is_read_as_the_repository_lays_it_out(tmp_path: Path) -> None:
    first, second = ROWS["gsm8k"]
    jsonl(tmp_path / "main/train-00000-of-00001.jsonl", [second])
    jsonl(tmp_path / "main/test-00000-of-00001.jsonl", [first])
    jsonl(tmp_path / "socratic/test-00000-of-00001.jsonl", [second])
    assert [prompt.turns for prompt in loaded("gsm8k", tmp_path)] == TURNS["gsm8k"][:1]
    flat = jsonl(tmp_path / "flat/part.jsonl", [second])
    assert [prompt.turns for prompt in loaded("gsm8k", flat.parent)] == TURNS["gsm8k"][1:]


def test_math_is_graded_by_the_dataset_answer(tmp_path: Path) -> None:
    first, second = loaded("gsm8k", jsonl(tmp_path / "copy.jsonl", ROWS["gsm8k"]))
    assert graded(first, "That makes 42.") is True
    assert graded(first, "That makes 41.") is False
    assert graded(second, "#### 1001") is True


@pytest.mark.parametrize(
    ("number", "output", "correct"),
    [
        (0, "    return sum(x)\n", True),
        (0, "```python\ndef total(x: List[int]) -> int:\n    return sum(x)\n```", True),  # with the prompt's import
        (0, "```python\ndef total(x):\n    return 3 * len(x)\n```", False),
        (1, "    return encode(s)\n", True),
        (1, "```python\ndef decode(s):\n    return encode(s)\n```", True),  # the prompt's other function stays
        (1, "```python\ndef decode(s):\n    return s\n```", False),
    ],
)
def test_code_is_graded_by_the_dataset_tests(number: int, output: str, correct: bool, tmp_path: Path) -> None:
    prompts = loaded("humaneval", jsonl(tmp_path / "copy.jsonl", ROWS["humaneval"]))
    assert graded(prompts[number], output) is correct


def test_the_hash_covers_what_was_loaded(tmp_path: Path) -> None:
    hashes = set()
    for column, value in (
        (None, None),
        ("prompt", "def total(x): ..."),
        ("test", "check = print"),
        ("entry_point", "f"),
    ):
        row = ROWS["humaneval"][0] | ({column: value} if column else {})
        hashes.add(prompt_set_hash(loaded("humaneval", jsonl(tmp_path / f"{column}.jsonl", [row]))))
    for answer in ("#### 1", "#### 2"):
        row = {"question": "How many?", "answer": answer}
        hashes.add(prompt_set_hash(loaded("gsm8k", jsonl(tmp_path / f"{answer[-1]}.jsonl", [row]))))
    assert len(hashes) == 6


def test_wrong_copies_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data\.path=.*nothing: no such file or folder"):
        loaded("gsm8k", tmp_path / "nothing")
    with pytest.raises(RequestError, match=r"no \*\.parquet, \*\.jsonl, \*\.json file there"):
        loaded("gsm8k", tmp_path)
    (tmp_path / "copy.txt").write_text("text")
    with pytest.raises(RequestError, match=r"copy\.txt: must be one of \.parquet, \.jsonl, \.json"):
        loaded("gsm8k", tmp_path / "copy.txt")
    with pytest.raises(RequestError, match=r"needs the columns question, answer; answer not found"):
        loaded("gsm8k", jsonl(tmp_path / "other.jsonl", [{"question": "How many?"}]))
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(RequestError, match=r"broken\.parquet: cannot be read as parquet"):
        loaded("gsm8k", tmp_path / "broken.parquet")
    with pytest.raises(RequestError, match=r"copy\.jsonl:1: turns must be a list of one or more texts"):
        loaded("mt_bench", jsonl(tmp_path / "copy.jsonl", [{"prompt": [], "reference": []}, ROWS["mt_bench"][0]]))
    with pytest.raises(RequestError, match=r"data\.name=mine: data\.hub is read for one of mt_bench, humaneval"):
        load_prompts(benchmark("gsm8k", "data.name=mine"))


def cached(cache: Path, revision: str, rows: list[dict]) -> None:
    """Put rows into the cache of `datasets` as GSM8K's test split at a commit."""
    file = jsonl(cache.parent / "source.jsonl", rows)
    dataset = load_dataset("json", data_files={"test": str(file)}, split="test", cache_dir=str(cache.parent / "other"))
    folder = cache / "openai___gsm8k" / "main" / "0.0.0" / revision
    folder.mkdir(parents=True)
    (written,) = (Path(found["filename"]) for found in dataset.cache_files)
    written.rename(folder / "gsm8k-test.arrow")
    info = json.loads((written.parent / "dataset_info.json").read_text())
    info |= {"builder_name": "parquet", "dataset_name": "gsm8k", "config_name": "main"}
    info["splits"]["test"]["dataset_name"] = "gsm8k"
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_a_cached_revision_is_read_offline(own_cache: Path) -> None:
    data = benchmark("gsm8k")
    cached(own_cache, data.hub.revision, ROWS["gsm8k"])
    prompts = load_prompts(data)
    assert [prompt.turns for prompt in prompts] == TURNS["gsm8k"]
    assert prompts[1].place == "openai/gsm8k@740312ad:1"


def test_another_cached_revision_is_refused_offline(own_cache: Path) -> None:
    cached(own_cache, "0" * 40, ROWS["gsm8k"])
    with pytest.raises(RequestError, match=r"at revision 740312add.*the cache holds revision 0{40}"):
        load_prompts(benchmark("gsm8k"))


def test_offline_the_remedy_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "model=tiny", "data=gsm8k", "hydra.run.dir=out"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "openai/gsm8k at revision 740312add88f781978c0658806c59bc2815b9866" in done.stderr
    assert "data=specbench data.path=FILE_OR_FOLDER" in done.stderr
    assert "Traceback" not in done.stderr
