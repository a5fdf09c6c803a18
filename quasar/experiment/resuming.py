"""The sequences that earlier attempts of a run decoded, for drafters that learn from one prompt to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quasar.drafters.base import FinishedSequence
from quasar.evaluation.prompts import Prompt
from quasar.model.tokenizer import Message, Tokenizer
from quasar.results.schema import PromptRecord


def finished_sequences(
    prompts: Sequence[Prompt], records: Sequence[PromptRecord], tokenizer: Tokenizer
) -> Iterator[FinishedSequence]:
    """Yield every sequence that was decoded with the drafter, in order: a prompt's answers, then its forced answers."""
    known = {prompt.key: prompt for prompt in prompts}
    for record in records:
        texts = known[record.question_id].turns
        answers = [(turn.token_ids, turn.steps.emitted) for turn in record.turns]
        yield from _conversation(texts, answers, tokenizer)
        forced = [(answer.token_ids, answer.emitted) for answer in record.fidelity]
        yield from _conversation(texts, forced, tokenizer)


def _conversation(
    texts: Sequence[str], answers: Sequence[tuple[list[int], list[int]]], tokenizer: Tokenizer
) -> Iterator[FinishedSequence]:
    """Yield the sequences of one conversation, given the token ids and the emitted tokens per step of each answer."""
    messages: list[Message] = []
    for text, (tokens, emitted) in zip(texts, answers, strict=False):
        messages.append({"role": "user", "content": text})
        # The first token comes from the prefill. A drafter sees the tokens of a step at its next draft, so the last
        # step's are left out.
        seen = 1 + sum(emitted[:-1]) if emitted else 0
        yield FinishedSequence(tokenizer.encode_chat(messages), tokens[:seen])
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens)})
