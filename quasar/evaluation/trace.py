"""Acceptance traces: what a run's ``generations.jsonl`` says of how many tokens were drafted and kept at every step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from quasar.errors import RequestError


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

    Raises RequestError where the file is missing, is no ``generations.jsonl`` or holds no step.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read ({error}); name the generations.jsonl of a finished run") from None
    turns = []
    for number, line in enumerate(lines, start=1):
        try:
            for turn in json.loads(line)["turns"]:
                steps = turn["steps"]
                traced = TracedTurn(int(turn["prompt_tokens"]), tuple(steps["drafted"]), tuple(steps["accepted"]))
                if len(traced.drafted) != len(traced.accepted):
                    raise ValueError("drafted and accepted differ in length")
                turns += [traced] if traced.drafted else []
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(f"{path}, line {number}: not a line of generations.jsonl ({reason})") from None
    if not turns:
        raise RequestError(f"{path}: holds no decoding step; name the generations.jsonl of a run that drafted")
    return turns
