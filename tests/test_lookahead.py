"""Compares lookahead with the authors' algorithm (Fu et al. 2024) in a slow form: every row is a separate sequence."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import Context
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.evaluation.prompts import load_prompts
from quasar.model.kv_cache import KVCache
from quasar.model.loading import load_transformer, random_transformer, tiny_config
from quasar.model.sources import Checkpoint
from quasar.model.tokenizer import load_tokenizer
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.compose import composed_run

NextToken = Callable[[list[int]], int]


def authors_lookahead(
    next_token: NextToken,
    prompt: list[int],
    length: int,
    window: int,
    ngram: int,
    guesses: int,
    pooled: bool,
    window_in_prefill: bool = True,
) -> tuple[list[int], list[int]]:
    """Output of the authors' greedy search, and the tokens of each pass after the one that reads the prompt.

    As in their code the window moves one position per pass, guesses are verified once it is full, and one that is right
    to its end brings the token after it too. There the first iterate rides in the pass that reads the prompt already;
    ``window_in_prefill`` False leaves it to the next one.
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

    tokens = list(prompt) if window_in_prefill else [*prompt, next_token(prompt)]
    if pooled:
        for start in range(len(prompt) - ngram + 1):
            remember(prompt[start : start + ngram])
    passes = [] if window_in_prefill else [1]
    while len(tokens) - len(prompt) < length:
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
                    correct = [hits[0]]
                    while len(correct) < ngram and guess[len(correct) - 1] == correct[-1]:
                        correct.append(next_token(tokens + guess[: len(correct)]))
                    hits = max(hits, correct, key=len)
                first = [tokens[-1], *past[0]]
                for column, above in enumerate(columns):
                    remember([first[column], *above, results[column]])
                past = [past[1][1:], *past[2:], results]
        for token in hits:
            tokens.append(token)
            if pooled and len(tokens) >= ngram:
                remember(tokens[-ngram:])
        passes.append(len(hits))
    return tokens[len(prompt) :][:length], passes[1:]


def remembering(model: Transformer) -> NextToken:
    """The token after a sequence by the model's argmax; reads only what follows the beginning shared with the last."""
    cache = KVCache(model.config, 128, model.dtype, model.device)
    held: list[int] = []
    known: dict[tuple[int, ...], int] = {}

    @torch.inference_mode()
    def next_token(tokens: list[int]) -> int:
        key = tuple(tokens)
        if key not in known:
            shared = 0
            while shared < min(len(held), len(tokens) - 1) and held[shared] == tokens[shared]:
                shared += 1
            cache.length = shared
            cache.reserve(len(tokens) - shared)
            known[key] = int(model(torch.tensor(tokens[shared:]), cache, outputs=slice(-1, None)).argmax())
            held[:] = tokens
        return known[key]

    return next_token


def generate(drafter: LookaheadDrafter, verifier: FP16Verifier, prompt: list[int], length: int) -> Generation:
    limits = Limits(length, 2048, frozenset())
    return decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())


@pytest.mark.parametrize(("window", "ngram", "guesses"), [(5, 4, 5), (4, 3, 3), (3, 5, 4), (1, 3, 1)])
def test_every_step_is_that_of_the_authors_algorithm(window: int, ngram: int, guesses: int) -> None:
    """Where nothing of the prompt is pooled, warm-up has nothing to guess, and the two agree step by step."""
    longest = 0
    for seed in (0, 1, 2, 3, 5):  # two tokens of seed 4's output are equally likely but for float32's rounding
        model = random_transformer(tiny_config(vocab_size=48, num_layers=2), seed, torch.float32)
        prompt = torch.randint(0, 48, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected, passes = authors_lookahead(
            remembering(model), prompt, 64, window, ngram, guesses, pooled=False, window_in_prefill=False
        )
        drafter = LookaheadDrafter(window, ngram, guesses, pool_from_prompt=False)
        generation = generate(drafter, FP16Verifier(model, Setup(128)), prompt, 64)
        assert generation.tokens == expected
        # The last step is shortened at the end of the output.
        assert generation.emitted[:-1] == passes[:-1]
        longest = max(longest, *passes)
    assert longest == ngram  # a guess that was right to its end, and the token after it


@pytest.mark.slow
@pytest.mark.smollm2
def test_acceptance_length_on_built_in_prompts_is_at_least_that_of_the_authors_algorithm(smollm2: Checkpoint) -> None:
    """The default settings, on one prompt of every family except summarization, whose prompt is long."""
    assert smollm2.folder is not None
    model, tokenizer = load_transformer(smollm2.folder, torch.float32), load_tokenizer(smollm2)
    verifier, drafter = FP16Verifier(model, Setup(1024)), LookaheadDrafter()
    ours: list[float] = []
    theirs: list[float] = []
    for text in load_prompts(composed_run("data.limit=1").data)[:4]:
        prompt = tokenizer.encode_chat([{"role": "user", "content": text.turns[0]}])
        expected, passes = authors_lookahead(remembering(model), prompt, 24, 5, 4, 5, pooled=True)
        generation = generate(drafter, verifier, prompt, 24)
        assert generation.tokens == expected, text.key
        ours.append(sum(generation.emitted) / len(generation.emitted))
        theirs.append(sum(passes) / len(passes))
    assert sum(theirs) / len(theirs) > 1.2  # else little was guessed right
    assert sum(ours) >= sum(theirs), (ours, theirs)


def test_pool_keeps_more_ngrams_than_are_guessed_where_asked() -> None:
    """Of three continuations of 5, two are guessed; the oldest is still there once it is seen again."""
    drafter = LookaheadDrafter(window=2, ngram=3, guesses=2, pool_capacity=3)
    drafter.begin(torch.tensor([1]))
    draft = drafter.propose(Context([5, 1, 2, 5, 1, 3, 5, 7, 8, 5], 1, Sampling(), torch.Generator()), 10)
    assert draft.tokens == [7, 8, 1, 3]
    assert list(drafter._pool[5]) == [(1, 2), (1, 3), (7, 8)]


def test_window_begins_with_prompt_tokens_or_the_last_one() -> None:
    prompt = torch.tensor([3, 4, 5])
    from_prompt, repeated = LookaheadDrafter(), LookaheadDrafter(window_from_prompt=False)
    for drafter in (from_prompt, repeated):
        drafter.begin(prompt)
    assert set(from_prompt._levels[0]) == {3, 4, 5}
    assert repeated._levels == [[5] * 6]
