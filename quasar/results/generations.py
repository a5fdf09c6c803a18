"""The only reader of generations.jsonl. It has few imports, so that it works with only PyTorch installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quasar.errors import RequestError
from quasar.inputs import open_regular
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

        Raises RequestError for a line that does not follow the schema; the message names the version that was found or
        the key that is missing.
        """
        if not self.file.exists():
            return []
        with open_regular(self.file) as stream:
            stream.seek(self.whole_bytes)
            lines, whole = whole_lines(stream.read())
        records = [self._record(line, number) for number, line in enumerate(lines, start=len(self.records) + 1)]
        self.records += records
        self.whole_bytes += whole
        return records

    def _record(self, line: object, number: int) -> PromptRecord:
        try:
            return PromptRecord.from_json(line)
        except ValueError as error:
            raise RequestError(
                f"{self.file}, line {number}: not a line of generations.jsonl in the current schema ({error}); decode "
                "the prompts again in another hydra.run.dir (for a sweep: in another hydra.sweep.dir, or without "
                "sweep.any_code=true)"
            ) from None


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
