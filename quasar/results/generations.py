"""The only reader of generations.jsonl. It has few imports, so that it works with only PyTorch installed."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quasar.config.inputs import open_regular
from quasar.errors import RequestError
from quasar.results.schema import PromptRecord

GENERATIONS = "generations.jsonl"


class GenerationsFile:
    """Reads a generations.jsonl, also while a run appends to it.

    records: the records of all lines read so far
    whole_bytes: size of these lines in bytes; anything after them is an incomplete or damaged line
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: list[PromptRecord] = []
        self.whole_bytes = 0

    def read_on(self) -> list[PromptRecord]:
        """Return the records of the complete lines added since the last call, or no records if there is no file.

        Raises RequestError for a line that does not follow the schema or was changed after it was written; the message
        names the version that was found, the key that is missing, or the checksum.
        """
        if not self.file.exists():
            return []
        with open_regular(self.file) as stream:
            stream.seek(self.whole_bytes)
            content = stream.read()
        lines, whole = whole_lines(content)
        # A crash can damage only the last line.
        if b"\n" in content[whole:-1]:
            raise self._refused(len(self.records) + len(lines) + 1, "it is not valid JSON, but other lines follow it")
        records = [self._record(line, number) for number, line in enumerate(lines, start=len(self.records) + 1)]
        self.records += records
        self.whole_bytes += whole
        return records

    def _record(self, line: object, number: int) -> PromptRecord:
        try:
            return PromptRecord.from_json(line)
        except ValueError as error:
            raise self._refused(number, str(error)) from None

    def require_prompts(self, prompts: Collection[str]) -> None:
        """Check that the records are answers to these prompts, each answered at most once per repetition.

        Raises RequestError, which names the line.
        """
        seen: dict[tuple[str, int], int] = {}
        for number, record in enumerate(self.records, start=1):
            name = record.question_id
            if name not in prompts:
                raise self._refused(number, f"question_id {name!r} is not among the prompts")
            key = (name, record.repetition)
            if key in seen:
                raise self._refused(number, f"question_id {name!r} is also in line {seen[key]}")
            seen[key] = number
            if not record.turns:
                raise self._refused(number, f"question_id {name!r} has no turns")
            for turn in record.turns:
                # The first token comes from the prefill and belongs to no step.
                if len(turn.token_ids) != 1 + sum(turn.steps.emitted):
                    raise self._refused(number, f"question_id {name!r} has other tokens than its steps emitted")

    def _refused(self, number: int, reason: str) -> RequestError:
        return RequestError(
            f"{self.file}, line {number}: not a line of generations.jsonl in the current schema ({reason}); decode "
            "the prompts again in another hydra.run.dir (for a sweep: in another hydra.sweep.dir, or without "
            "sweep.any_code=true)"
        )


def read_records(folder: Path) -> list[PromptRecord]:
    """Return the records of a run's finished prompts. Raises RequestError if they follow another schema."""
    return GenerationsFile(folder / GENERATIONS).read_on()


def whole_lines(content: bytes) -> tuple[list[Any], int]:
    """Return the values of the JSON lines before the first incomplete or damaged line, and their size in bytes."""
    values: list[Any] = []
    whole = 0
    while (end := content.find(b"\n", whole)) >= 0:
        try:
            values.append(json.loads(content[whole:end]))
        except (ValueError, RecursionError):
            break
        whole = end + 1
    return values, whole
