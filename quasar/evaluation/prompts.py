"""Reads prompts: the built-in set, Spec-Bench JSONL files, or benchmarks of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quasar.config.schema import DataConfig
from quasar.errors import RequestError
from quasar.evaluation.benchmarks import Row, benchmark_rows

BUILTIN = Path(__file__).parent / "prompts"
FAMILIES = ("chat", "code", "math", "instruction", "summarization")


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
        raise RequestError(f"{key}={data.path}: the prompt files contain no prompt")
    return prompts


def read_prompts(file: Path, by_file: bool) -> Iterator[Prompt]:
    """Yield the prompts of one Spec-Bench JSONL file.

    Its keys are ``question_id``, ``category`` and ``turns``, optionally ``reference``, and HumanEval's ``test`` and
    ``entry_point``.

    by_file: whether the file's name is the task family (for a folder with one file per task) instead of ``category``
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse(line, file, number, by_file)


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
    keys = Counter(prompt.key for prompt in prompts)
    for prompt in prompts:
        if keys[prompt.key] > 1:
            raise RequestError(
                f"{prompt.place}: question_id {prompt.key} occurs {keys[prompt.key]} times; make it unique"
            )
    return _limited(prompts, data.limit)


def _from_hub(data: DataConfig) -> list[Prompt]:
    return [_prompt(row, place, data.name, prefix=f"{data.name}/") for place, row in benchmark_rows(data)]


def _parse(line: str, file: Path, number: int, by_file: bool) -> Prompt:
    place = f"{file}:{number}"
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{place}: not valid JSON ({error}); every line must be one JSON object") from None
    if not isinstance(raw, dict) or "question_id" not in raw or "turns" not in raw:
        raise RequestError(f"{place}: needs the keys question_id and turns (Spec-Bench format)")
    family = file.stem if by_file else str(raw.get("category") or file.stem)
    return _prompt(raw, place, family, prefix=f"{file.stem}/" if by_file else "")


def _prompt(raw: Row, place: str, family: str, prefix: str) -> Prompt:
    """Return the prompt of a row in Spec-Bench form; ``prefix`` keeps keys of several files or datasets apart."""
    turns = raw["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise RequestError(f"{place}: turns must be a list of one or more texts, found {turns!r:.80}")
    references = raw.get("reference") or []
    references = [references] if isinstance(references, str) else references
    test = raw.get("test")
    if test is not None and "entry_point" in raw:
        test = f"{test}\n\ncheck({raw['entry_point']})"
    key = f"{prefix}{raw['question_id']}"
    return Prompt(key, family, tuple(turns), tuple(map(str, references)), place, test)


def _files(data: DataConfig, key: str) -> list[Path]:
    if data.path is None:
        raise RequestError(f"{key} is not set; data={data.name} needs {key}=FILE_OR_FOLDER")
    path = Path(data.path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RequestError(f"{key}={path}: no such file or folder; pass a .jsonl file or a folder of them")
    files = sorted(path.glob("*.jsonl"))
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
