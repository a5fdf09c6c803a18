"""Writes the answers of runs as Spec-Bench's evaluation reads them (Xia et al. 2024, ``evaluation/speed.py``)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from quasar.errors import RequestError
from quasar.results.generations import GENERATIONS, GenerationsFile
from quasar.results.runs import StoredRun
from quasar.results.schema import PHASES, Json, PromptRecord, Turn
from quasar.results.store import write_atomically


def write_answers(runs: Sequence[StoredRun], root: Path, folder: Path) -> list[Path]:
    """Write one JSONL file of answers per run into ``folder``, and return the files.

    Each line is a question: ``question_id``, ``category``, ``answer_id``, ``model_id``, ``choices`` and ``tstamp``. A
    choice is a repetition. Of every turn it has the text, the steps, the new tokens and the wall time in seconds, that
    of the prefill included; ``accept_lengths`` has the tokens of every step of all turns, the bonus token included.
    A run with ``drafter=none verifier=fp16`` is the baseline that speed.py compares with.

    For example, two steps that emit 3 tokens and 1 token after the first token of the prefill are
    ``"decoding_steps": [2], "new_tokens": [5], "accept_lengths": [3, 1]``.

    Raises RequestError if no run has an answer.
    """
    files = []
    for run in runs:
        source = run.folder / GENERATIONS
        generations = GenerationsFile(source)
        if not generations.read_on():
            continue
        model, time = _model_id(run, root), source.stat().st_mtime
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in _answers(generations.records, model, time)]
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{model}.jsonl")
        write_atomically(files[-1], "".join(lines))
    if not files:
        raise RequestError(f"{root}: no run has an answer yet; wait for the first prompt, or pass another folder")
    return files


def _answers(records: Sequence[PromptRecord], model: str, time: float) -> list[Json]:
    """Return one object per question, in the order of the file."""
    questions: dict[str, list[PromptRecord]] = {}
    for record in records:
        questions.setdefault(record.question_id, []).append(record)
    return [
        {
            "question_id": _as_written(name),
            "category": repetitions[0].family,
            "answer_id": hashlib.sha256(f"{model}/{name}".encode()).hexdigest()[:22],
            "model_id": model,
            "choices": [_choice(record) for record in sorted(repetitions, key=lambda record: record.repetition)],
            "tstamp": time,
        }
        for name, repetitions in questions.items()
    ]


def _choice(record: PromptRecord) -> Json:
    return {
        "index": record.repetition,
        "turns": [turn.text for turn in record.turns],
        "decoding_steps": [len(turn.steps.emitted) for turn in record.turns],
        "new_tokens": [len(turn.token_ids) for turn in record.turns],
        "wall_time": [_seconds(turn) for turn in record.turns],
        "accept_lengths": [length for turn in record.turns for length in turn.steps.emitted],
    }


def _seconds(turn: Turn) -> float:
    return sum(sum(getattr(turn.milliseconds, phase)) for phase in PHASES) / 1000


def _as_written(question: str) -> int | str:
    """Return a question's id as Spec-Bench's file has it: an integer, unless it is a text that is no number."""
    return int(question) if question.isdecimal() and str(int(question)) == question else question


def _model_id(run: StoredRun, root: Path) -> str:
    """Return a name of the run that is also the name of a file: its parts and its place below ``root``."""
    parts = [str((run.config.get(group) or {}).get("name", "unknown")) for group in ("model", "drafter", "verifier")]
    place = os.path.relpath(run.folder, root)
    return "-".join([*parts, *(() if place == "." else (place.replace(os.sep, "-"),))])
