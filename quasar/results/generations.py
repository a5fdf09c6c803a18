"""The only reader of a run's JSON lines, generations.jsonl and passes.jsonl. It has few imports, so that it works with
only PyTorch installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Generic, TypeVar

from quasar.config.inputs import open_regular
from quasar.errors import RequestError
from quasar.results.schema import PassPoint, PassRecord, PromptRecord

GENERATIONS, PASSES = "generations.jsonl", "passes.jsonl"
Record = TypeVar("Record")


class RecordsFile(Generic[Record]):
    """Reads a file of JSON lines, also while a run appends to it.

    kind: name of such files in a run's folder
    parse: turns a line's value into its record; raises ValueError if the line does not follow the schema
    records: the records of all lines read so far
    whole_bytes: size of these lines in bytes; anything after them is an incomplete or damaged line
    """

    def __init__(self, file: Path, kind: str, parse: Callable[[object], Record]) -> None:
        self.file = file
        self.records: list[Record] = []
        self.whole_bytes = 0
        self._kind, self._parse = kind, parse

    def read_on(self) -> list[Record]:
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

    def _record(self, line: object, number: int) -> Record:
        try:
            return self._parse(line)
        except ValueError as error:
            raise self._refused(number, str(error)) from None

    def _refused(self, number: int, reason: str) -> RequestError:
        return RequestError(
            f"{self.file}, line {number}: not a line of {self._kind} in the current schema ({reason}); run again in "
            "another hydra.run.dir (for a sweep: in another hydra.sweep.dir, or without sweep.any_code=true)"
        )


class GenerationsFile(RecordsFile[PromptRecord]):
    """Reads a generations.jsonl."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, GENERATIONS, PromptRecord.from_json)

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


class PassesFile(RecordsFile[PassRecord]):
    """Reads a passes.jsonl."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, PASSES, PassRecord.from_json)

    def require_points(self, points: Collection[PassPoint]) -> None:
        """Check that the records are passes at these points, each timed at most once.

        Raises RequestError, which names the line.
        """
        seen: dict[PassPoint, int] = {}
        for number, record in enumerate(self.records, start=1):
            name = f"the pass of {record.rows} rows behind {record.context} tokens, repetition {record.repetition},"
            if record.point not in points:
                raise self._refused(number, f"{name} is not among those of this run")
            if record.point in seen:
                raise self._refused(number, f"{name} is also in line {seen[record.point]}")
            seen[record.point] = number


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
        except (ValueError, RecursionError):
            break
        whole = end + 1
    return values, whole
