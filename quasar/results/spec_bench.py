"""Writes the answers of runs as Spec-Bench's evaluation reads them (Xia et al. 2024, ``evaluation/speed.py``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from quasar.results.answers import Answers
from quasar.results.files import write_atomically
from quasar.results.schema import PHASES, Json, PromptRecord, Turn


def write_spec_bench(runs: Sequence[Answers], folder: Path) -> list[Path]:
    """Write one JSONL file of answers per run into ``folder``, and return the files.

    Each line is a question: ``question_id``, ``category``, ``answer_id``, ``model_id``, ``choices`` and ``tstamp``. A
    choice is a repetition. Of every turn it has the text, the steps, the new tokens and the wall time in seconds, that
    of the prefill included; ``accept_lengths`` has the tokens of every step of all turns, the bonus token included.
    A run with ``drafter=none verifier=fp16`` is the baseline that speed.py compares with.

    For example, two steps that emit 3 tokens and 1 token after the first token of the prefill are
    ``"decoding_steps": [2], "new_tokens": [5], "accept_lengths": [3, 1]``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for run in runs:
        files.append(folder / f"{run.name}.jsonl")
        write_atomically(files[-1], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(run)))
    return files


def _lines(run: Answers) -> list[Json]:
    """Return one object per question, in the order of the file."""
    return [
        {
            "question_id": question,
            "category": repetitions[0].family,
            "answer_id": hashlib.sha256(f"{run.name}/{question}".encode()).hexdigest()[:22],
            "model_id": run.name,
            "choices": [_choice(record) for record in repetitions],
            "tstamp": run.time,
        }
        for question, repetitions in run.questions().items()
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
