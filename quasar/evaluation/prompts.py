"""Reads prompts: the built-in set, Spec-Bench JSONL files, or benchmarks of the Hugging Face hub."""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from quasar.config.inputs import expanded, is_companion, json_lines, kind_of
from quasar.config.schema import DataConfig
from quasar.errors import RequestError
from quasar.evaluation.benchmarks import Row, benchmark_rows

BUILTIN = Path(__file__).parent / "prompts"
FAMILIES = ("chat", "code", "math", "instruction", "summarization")
_KEYS = ("question_id", "category", "turns", "reference", "test", "entry_point")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class Prompt:
    """The user turns of a conversation.

    key: unique name within the prompt set
    family: task family
    reference: correct answers
    place: file and line that the prompt was read from
    test: Python code that raises if the requested code is wrong
    """

    key: str
    family: str
    turns: tuple[str, ...]
    reference: tuple[str, ...]
    place: str
    test: str | None = None


def load_prompts(data: DataConfig, key: str = "data.path") -> list[Prompt]:
    """Return the prompts of ``data``, at most ``data.limit`` per task family, in file order.

    key: configuration key of the path, for error messages

    Raises RequestError for a missing path, a dataset that is not available, an empty set or an invalid line; the
    message names the file and the line.
    """
    prompts = _from_files(data, key) if data.hub is None else _from_hub(data)
    if not prompts:
        raise RequestError(f"{key}={data.path}: the prompt files contain no prompt; every line is one JSON object")
    return prompts


def read_prompts(file: Path, by_file: bool) -> Iterator[Prompt]:
    """Yield the prompts of one Spec-Bench JSONL file.

    Its keys are ``question_id``, ``category`` and ``turns``, optionally ``reference``, and HumanEval's ``test`` and
    ``entry_point``.

    by_file: whether the file's name is the task family (for a folder with one file per task) instead of ``category``
    """
    for place, raw in json_lines(file):
        yield _parse(raw, file, place, by_file)


def prompt_set_hash(prompts: list[Prompt]) -> str:
    """Return a SHA-256 over keys, task families, texts and what grades the answers, equal for equal prompt sets."""
    digest = hashlib.sha256()
    for prompt in prompts:
        values = [prompt.key, prompt.family, prompt.turns, prompt.reference, prompt.test]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def _from_files(data: DataConfig, key: str) -> list[Prompt]:
    files = [BUILTIN / f"{family}.jsonl" for family in FAMILIES] if data.name == "builtin" else _files(data, key)
    prompts = [prompt for file in files for prompt in read_prompts(file, by_file=len(files) > 1)]
    _refuse_repeated_keys(prompts)
    return _limited(prompts, data.limit)


def _from_hub(data: DataConfig) -> list[Prompt]:
    prompts = [
        _prompt(row, place, row.get("category", data.name), prefix=f"{data.name}/")
        for place, row in benchmark_rows(data)
    ]
    _refuse_repeated_keys(prompts)
    return _limited(prompts, data.limit)


def _parse(raw: Any, file: Path, place: str, by_file: bool) -> Prompt:
    if not isinstance(raw, dict):
        raise RequestError(f"{place}: must be a JSON object, found {_shown(raw)}")
    if "question_id" not in raw or "turns" not in raw:
        raise RequestError(f"{place}: needs the keys question_id and turns (Spec-Bench format), found {_shown([*raw])}")
    for key in raw:
        # A misspelled optional key would go unnoticed: the prompt would not be graded, or be of another family.
        meant = get_close_matches(key.strip().lower(), _KEYS, n=1, cutoff=0.85)
        if key not in _KEYS and meant and meant[0] not in raw:
            raise RequestError(f"{place}: the key {key!r} is not known; write {meant[0]}, or rename it")
    category = raw.get("category")
    if category is not None and not isinstance(category, str):
        raise RequestError(f"{place}: category must be a text, found {_shown(category)}")
    family = file.stem if by_file else category or file.stem
    return _prompt(raw, place, family, prefix=f"{file.stem}/" if by_file else "")


def _prompt(raw: Row, place: str, family: str, prefix: str) -> Prompt:
    """Return the prompt of a row in Spec-Bench form; ``prefix`` keeps keys of several files or datasets apart."""
    identity, turns = raw["question_id"], raw["turns"]
    if isinstance(identity, bool) or not isinstance(identity, int | str) or not str(identity).strip():
        raise RequestError(f"{place}: question_id must be an integer or a text, found {_shown(identity)}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise RequestError(f"{place}: turns must be a list of one or more texts, found {_shown(turns)}")
    references = raw.get("reference")
    references = [] if references is None else [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise RequestError(f"{place}: reference must be a text or a list of texts, found {_shown(references)}")
    return Prompt(f"{prefix}{identity}", family, tuple(turns), tuple(references), place, _test(raw, place))


def _test(raw: Row, place: str) -> str | None:
    """Return the code that grades an answer. With an entry point, ``check`` is called with that function."""
    test, entry_point = raw.get("test"), raw.get("entry_point")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise RequestError(f"{place}: entry_point must be the name of a function, found {_shown(entry_point)}")
    if test is None:
        if entry_point is not None:
            raise RequestError(f"{place}: entry_point needs the key test, which is missing; add it or remove both")
        return None
    if not isinstance(test, str):
        raise RequestError(f"{place}: test must be a text of Python code, found {_shown(test)}")
    code = test if entry_point is None else f"{test}\n\ncheck({entry_point})"
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # A test that cannot run would grade every answer as wrong.
        raise RequestError(f"{place}: test is not valid Python ({error})") from None
    return code


def _refuse_repeated_keys(prompts: list[Prompt]) -> None:
    places: dict[str, str] = {}
    for prompt in prompts:
        if prompt.key in places:
            raise RequestError(
                f"{prompt.place}: question_id {prompt.key} occurs 2 times, first at {places[prompt.key]}; "
                "make it unique"
            )
        places[prompt.key] = prompt.place


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _files(data: DataConfig, key: str) -> list[Path]:
    if data.path is None:
        raise RequestError(f"{key} is not set; data={data.name} needs {key}=FILE_OR_FOLDER")
    path = expanded(data.path, key)
    if kind_of(path, key) == "file":
        return [path]
    try:
        found = sorted(file for file in path.iterdir() if not is_companion(file))
    except OSError as error:
        raise RequestError(f"{key}={path}: this folder cannot be read ({error.strerror})") from None
    for file in found:
        if file.suffix.lower() in _COMPRESSED and Path(file.stem).suffix.lower() == ".jsonl":
            raise RequestError(f"{key}={path}: {file.name} is compressed; decompress it, or move it out of the folder")
    files = [file for file in found if file.suffix.lower() == ".jsonl"]
    if not files:
        raise RequestError(f"{key}={path}: this folder contains no *.jsonl file")
    return files


def _limited(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    taken: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        taken[prompt.family] += 1
        if limit is None or taken[prompt.family] <= limit:
            kept.append(prompt)
    return kept
