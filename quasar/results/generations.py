"""The only reader of a run's JSON lines, generations.jsonl and passes.jsonl. It has few imports, so that it works with
only PyTorch installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from quasar.errors import RequestError
from quasar.results.schema import PassRecord, PromptRecord

GENERATIONS, PASSES = "generations.jsonl", "passes.jsonl"
Record = TypeVar("Record")


class RecordsFile(Generic[Record]):
    """Reads a file of JSON lines, also while a run appends to it.

    parse: turns a line's value into its record; raises ValueError if the line does not follow the schema
    records: the records of all lines read so far
    whole_bytes: size of these lines in bytes; anything after them is an incomplete or damaged line
    """

    def __init__(self, file: Path, parse: Callable[[object], Record]) -> None:
        self.file = file
        self.records: list[Record] = []
        self.whole_bytes = 0
        self._parse = parse

    def read_on(self) -> list[Record]:
        """Return the records of the complete lines added since the last call, or no records if there is no file.

        Raises RequestError for a line that does not follow the schema; the message names the version that was found or
        the key that is missing.
        """
        if not self.file.exists():
            return []
        with self.file.open("rb") as stream:
            stream.seek(self.whole_bytes)
            lines, whole = whole_lines(stream.read())
        records = [self._record(line, number) for number, line in enumerate(lines, start=len(self.records) + 1)]
        self.records += records
        self.whole_bytes += whole
        return records

    def _record(self, line: object, number: int) -> Record:
        try:
            return self._parse(line)
        except ValueError as error:
            raise RequestError(
                f"{self.file}, line {number}: not a line of {self.file.name} in the current schema ({error}); run "
                "again in another hydra.run.dir (for a sweep: in another hydra.sweep.dir, or without "
                "sweep.any_code=true)"
            ) from None


class GenerationsFile(RecordsFile[PromptRecord]):
    """Reads a generations.jsonl."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, PromptRecord.from_json)


class PassesFile(RecordsFile[PassRecord]):
    """Reads a passes.jsonl."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, PassRecord.from_json)


def read_records(folder: Path) -> list[PromptRecord]:
    """Return the records of a run's finished prompts. Raises RequestError if they follow another schema."""
    return GenerationsFile(folder / GENERATIONS).read_on()


def read_passes(folder: Path) -> list[PassRecord]:
    """Return a run's timed passes, none if it did not measure them. Raises RequestError for another schema."""
    return PassesFile(folder / PASSES).read_on()


def whole_lines(content: bytes) -> tuple[list[Any], int]:
    """Return the values of the JSON lines before the first incomplete or damaged line, and their size in bytes."""
    values: list[Any] = []
    whole = 0
    while (end := content.find(b"\n", whole)) >= 0:
        try:
            values.append(json.loads(content[whole:end]))
        except ValueError:
            break
        whole = end + 1
    return values, whole
