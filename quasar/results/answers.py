"""The answers of stored runs, for the files that evaluations of other benchmarks read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quasar.errors import RequestError
from quasar.results.generations import GENERATIONS, GenerationsFile
from quasar.results.runs import StoredRun
from quasar.results.schema import PromptRecord


@dataclass(frozen=True)
class Answers:
    """What a run answered.

    name: the run's parts and its place below the folder of all runs; also the name of a file
    time: when the last answer was written, in seconds since 1970
    """

    name: str
    time: float
    records: Sequence[PromptRecord]

    def questions(self) -> dict[int | str, list[PromptRecord]]:
        """Return the records of every question, its repetitions in order.

        A question's id is an integer, as in Spec-Bench's files, unless it is a text that is no number.
        """
        found: dict[int | str, list[PromptRecord]] = {}
        for record in self.records:
            found.setdefault(_as_written(record.question_id), []).append(record)
        for repetitions in found.values():
            repetitions.sort(key=lambda record: record.repetition)
        return found


def answers_of(runs: Sequence[StoredRun], root: Path) -> list[Answers]:
    """Return the answers of all runs that have any. Raises RequestError if none has."""
    found = []
    for run in runs:
        source = run.folder / GENERATIONS
        generations = GenerationsFile(source)
        if generations.read_on():
            found.append(Answers(_name(run, root), source.stat().st_mtime, generations.records))
    if not found:
        raise RequestError(f"{root}: no run has an answer yet; wait for the first prompt, or pass another folder")
    return found


def _as_written(question: str) -> int | str:
    return int(question) if question.isdecimal() and str(int(question)) == question else question


def _name(run: StoredRun, root: Path) -> str:
    parts = [str((run.config.get(group) or {}).get("name", "unknown")) for group in ("model", "drafter", "verifier")]
    place = os.path.relpath(run.folder, root)
    return "-".join([*parts, *(() if place == "." else (place.replace(os.sep, "-"),))])
