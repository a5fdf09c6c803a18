"""Lookahead against the authors' algorithm (Fu et al. 2024), written out slowly: every row is a sequence of its own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from quasar.acceptance import Greedy
from quasar.decode import decode
from quasar.draft import Context
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.limits import Limits
from quasar.model.loading import random_transformer, tiny_config
from quasar.sampling import Sampling
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

NextToken = Callable[[list[int]], int]


def authors_lookahead(
    next_token: NextToken, prompt: list[int], length: int, window: int, ngram: int, guesses: int, pooled: bool
) -> tuple[list[int], int]:
    """Output and steps of the authors' greedy search, its window one position further each step.

    As in their code, guesses are verified once the window is full, and a guess that is right to its end brings no
    bonus token. The first token belongs to the prefill.
    """
    choose = random.Random(0)
    past = [[choose.choice(prompt) for _ in range(window + ngram - 3)]]
    pool: dict[int, list[list[int]]] = {}

    def remember(found: list[int]) -> None:
        kept = pool.setdefault(found[0], [])
        if found[1:] in kept:
            kept.remove(found[1:])
        kept.append(found[1:])
        del kept[:-guesses]

    tokens = [*prompt, next_token(prompt)]
    if pooled:
        for start in range(len(prompt) - ngram + 1):
            remember(prompt[start : start + ngram])
    steps = 0
    while len(tokens) - len(prompt) < length:
        steps += 1
        hits = [next_token(tokens)]
        if len(past) == 1:
            results = [next_token(tokens + past[0][: column + 1]) for column in range(len(past[0]))]
            past = [past[0][1:], results]
        else:
            columns = [[level[column] for level in past[1:]] for column in range(len(past[-1]))]
            results = [next_token(tokens + past[0][:column] + above) for column, above in enumerate(columns)]
            if len(past) < ngram - 1:
                past = [*(level[1:] for level in past), results[1:]]
            else:
                for guess in pool.get(tokens[-1], []):
                    correct = [hits[0], *(next_token(tokens + guess[:size]) for size in range(1, ngram - 1))]
                    right = 0
                    while right < ngram - 2 and guess[right] == correct[right]:
                        right += 1
                    hits = max(hits, correct[: right + 1], key=len)
                first = [tokens[-1], *past[0]]
                for column, above in enumerate(columns):
                    remember([first[column], *above, results[column]])
                past = [past[1][1:], *past[2:], results]
        for token in hits:
            tokens.append(token)
            if pooled and len(tokens) >= ngram:
                remember(tokens[-ngram:])
    return tokens[len(prompt) :], steps


@pytest.mark.parametrize(
    ("window", "ngram", "guesses", "pooled"), [(5, 4, 5, True), (4, 3, 3, False), (3, 5, 4, False)]
)
def test_acceptance_length_is_at_least_that_of_the_authors_algorithm(
    window: int, ngram: int, guesses: int, pooled: bool
) -> None:
    ours = theirs = 0.0
    for seed in range(3):
        model = random_transformer(tiny_config(vocab_size=48, num_layers=2), seed, torch.float32)
        verifier = FP16Verifier(model, Setup(128))
        known: dict[tuple[int, ...], int] = {}

        @torch.inference_mode()
        def next_token(tokens: list[int], model=model, known=known) -> int:
            key = tuple(tokens)
            if key not in known:
                known[key] = int(model(torch.tensor(tokens), outputs=slice(-1, None)).argmax())
            return known[key]

        prompt = torch.randint(0, 48, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected, steps = authors_lookahead(next_token, prompt, 64, window, ngram, guesses, pooled)
        drafter = LookaheadDrafter(window, ngram, guesses, pool_from_prompt=pooled)
        limits = Limits(64, 2048, frozenset())
        generation = decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())
        assert generation.tokens == expected[:64]
        ours += sum(generation.emitted) / len(generation.emitted)
        theirs += (len(expected) - 1) / steps
    assert theirs / 3 > 1.1  # else nothing was guessed right
    assert ours >= theirs


def test_pool_keeps_more_ngrams_than_are_guessed_where_asked() -> None:
    """Of three continuations of 5, two are guessed; the oldest is still there once it is seen again."""
    drafter = LookaheadDrafter(window=2, ngram=3, guesses=2, pool_capacity=3)
    drafter.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
    draft = drafter.propose(Context([5, 1, 2, 5, 1, 3, 5, 7, 8, 5], 1, Sampling(), torch.Generator()), 10)
    assert draft.tokens == [7, 8, 1, 3]
    assert list(drafter._pool[5]) == [(1, 2), (1, 3), (7, 8)]


def test_window_begins_with_prompt_tokens_or_the_last_one() -> None:
    prompt = torch.tensor([3, 4, 5])
    from_prompt, repeated = LookaheadDrafter(), LookaheadDrafter(window_from_prompt=False)
    for drafter in (from_prompt, repeated):
        drafter.begin(prompt, None)  # type: ignore[arg-type]
    assert set(from_prompt._levels[0]) == {3, 4, 5}
    assert repeated._levels == [[5] * 6]
