"""The turns of a prompt, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from quasar.evaluation.conversation import conversation
from quasar.evaluation.prompts import Prompt


@dataclass(frozen=True)
class Said:
    token_ids: list[int]


class Letters:
    """A tokenizer of one token per letter, which writes u and a before the messages of user and assistant."""

    def encode_chat(self, messages) -> list[int]:
        return [ord(letter) for message in messages for letter in message["role"][0] + message["content"]]

    def decode(self, tokens) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(("context_length", "turns"), [(2, 0), (3, 1), (7, 1), (8, 2), (100, 3)])
def test_a_turn_contains_the_answers_before_it_and_must_leave_room(context_length: int, turns: int) -> None:
    """The contexts have 2, 7 and 12 tokens; the answer of turn n is its number, twice."""
    asked: list[tuple[str, str]] = []

    def answer(tokens: list[int], key: str) -> Said:
        asked.append((Letters().decode(tokens), key))
        return Said([ord(key[-1])] * 2)

    prompt = Prompt("q", "chat", ("x", "y", "z"), (), "here")
    found = conversation(prompt, Letters(), context_length, answer)  # type: ignore[arg-type]
    assert asked == [("ux", "q/0"), ("uxa00uy", "q/1"), ("uxa00uya11uz", "q/2")][:turns]
    assert found == [Said([ord(str(number))] * 2) for number in range(turns)]
