"""Acceptance traces: how many tokens a run drafted and accepted at every step, read from its ``generations.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quasar.errors import RequestError
from quasar.results.generations import GenerationsFile


@dataclass(frozen=True)
class TracedTurn:
    """One answer. Step s drafted ``drafted[s]`` tokens and ``accepted[s]`` of them were accepted.

    Scratch rows of a drafter, such as Lookahead's window, are not counted.
    """

    prompt_tokens: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]


def read_trace(path: Path) -> list[TracedTurn]:
    """Return all turns with at least one step, in order.

    Raises RequestError if the file is missing, does not follow the schema of ``generations.jsonl`` or has no step.
    """
    generations = GenerationsFile(path)
    try:
        records = generations.read_on()
        rest = path.stat().st_size - generations.whole_bytes
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error}); name the generations.jsonl of a finished run") from None
    if rest:
        raise RequestError(
            f"{path}, line {len(records) + 1}: not a line of generations.jsonl (incomplete or damaged); name the file "
            "of a finished run"
        )
    turns = [
        TracedTurn(turn.prompt_tokens, tuple(turn.steps.drafted), tuple(turn.steps.accepted))
        for record in records
        for turn in record.turns
        if turn.steps.drafted
    ]
    if not turns:
        raise RequestError(f"{path}: contains no decoding step; name the generations.jsonl of a run that drafted")
    return turns
