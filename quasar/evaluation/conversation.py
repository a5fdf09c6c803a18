"""Walks through the turns of a prompt: each answer becomes part of the next turn's context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from quasar.evaluation.prompts import Prompt
from quasar.model.tokenizer import Message, Tokenizer


class Reply(Protocol):
    @property
    def token_ids(self) -> list[int]: ...


Answer = TypeVar("Answer", bound=Reply)


def conversation(
    prompt: Prompt, tokenizer: Tokenizer, context_length: int, answer: Callable[[list[int], str], Answer]
) -> list[Answer]:
    """Call ``answer`` with each turn's (token ids, key) and return the results.

    The ``token_ids`` of a result are the reply in the context of the next turn. The conversation ends before the first
    turn that does not fit the context window.
    """
    messages: list[Message] = []
    turns: list[Answer] = []
    for number, text in enumerate(prompt.turns):
        messages.append({"role": "user", "content": text})
        tokens = tokenizer.encode_chat(messages)
        if len(tokens) >= context_length:
            break
        turns.append(answer(tokens, f"{prompt.key}/{number}"))
        messages.append({"role": "assistant", "content": tokenizer.decode(turns[-1].token_ids)})
    return turns
