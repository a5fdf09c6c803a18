"""Acceptance traces: what a run's ``generations.jsonl`` says of how many tokens were drafted and kept at every step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quasar.errors import RequestError
from quasar.results.generations import GenerationsFile


@dataclass(frozen=True)
class TracedTurn:
    """One answer. Step s drafted ``drafted[s]`` tokens, of which ``accepted[s]`` were kept; scratch rows of a drafter
    (Lookahead's window) are not recorded.
    """

    prompt_tokens: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]


def read_trace(path: Path) -> list[TracedTurn]:
    """All turns with at least one step, in order.

    Raises RequestError where the file is missing, is no ``generations.jsonl`` of this schema or holds no step.
    """
    generations = GenerationsFile(path)
    try:
        records = generations.read_on()
        rest = path.stat().st_size - generations.whole_bytes
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error}); name the generations.jsonl of a finished run") from None
    if rest:
        raise RequestError(
            f"{path}, line {len(records) + 1}: not a line of generations.jsonl (cut short or damaged); name that of a "
            "finished run"
        )
    turns = [
        TracedTurn(turn.prompt_tokens, tuple(turn.steps.drafted), tuple(turn.steps.accepted))
        for record in records
        for turn in record.turns
        if turn.steps.drafted
    ]
    if not turns:
        raise RequestError(f"{path}: holds no decoding step; name the generations.jsonl of a run that drafted")
    return turns
