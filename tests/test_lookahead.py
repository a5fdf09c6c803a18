"""Compares lookahead with the authors' algorithm (Fu et al. 2024) in a slow form: every row is a separate sequence."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import ROOT, Context, StepResult
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters._pass_cost import PassCost
from quasar.drafters._tree_size import Kind, NodeRates, TreeSize, by_probability, subtree
from quasar.drafters._window_size import WindowSize
from quasar.drafters.lookahead import JacobiWindow, LookaheadDrafter, window_rows
from quasar.drafters.none import NoneDrafter
from quasar.errors import RequestError
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
    """A fixed window, on one prompt of every family except summarization, whose prompt is long."""
    assert smollm2.folder is not None
    model, tokenizer = load_transformer(smollm2.folder, torch.float32), load_tokenizer(smollm2)
    verifier, drafter = FP16Verifier(model, Setup(1024)), LookaheadDrafter(5, 4, 5)
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
    prompt = [3, 4, 5]
    for from_prompt, expected in ((True, {3, 4, 5}), (False, {5})):
        drafter = LookaheadDrafter(window=9, window_from_prompt=from_prompt)
        drafter.begin(torch.tensor(prompt))
        scratch = drafter.propose(Context(prompt, 3, Sampling(), torch.Generator()), 5).scratch
        assert scratch is not None
        assert len(scratch.tokens) == 9 + 4 - 3
        assert set(scratch.tokens.tolist()) == expected


STEEP = PassCost([1, 64], [10], [[10.0, 10.0 + 0.65 * 63]])
"""Rows that cost 6.5 % of a pass each, as on two CPU cores."""


@pytest.mark.parametrize(("width", "ngram"), [(0, 3), (1, 3), (1, 4), (1, 7), (2, 5), (5, 4), (7, 5), (15, 5)])
def test_window_rows_are_the_most_that_any_step_needs(width: int, ngram: int) -> None:
    window = JacobiWindow(ngram, [1, 2], seed=0)
    window.resize(width)
    rows = []
    for _ in range(ngram + 2):
        scratch = window.scratch()
        rows.append(0 if scratch is None else len(scratch.tokens))
        if scratch is not None:
            assert window.width == width
            window.advance(1, [3] * len(scratch.outputs))
    assert window_rows(width, ngram) == max(rows)
    assert rows[-1] == max(0, (ngram - 1) * width - 1)


def test_resizing_keeps_the_other_columns_and_the_positions_of_the_rows() -> None:
    """A model that knows every position's number. After any change of the width, rows continue real sequences."""
    generator = random.Random(3)
    window = JacobiWindow(4, [1, 2], seed=0)
    widths = [3, 3, 3, 3, 3, 5, 5, 2, 2, 6, 6, 6, 6, 0, 4, 4, 1, 1, 1, 7, 7, 7, 7, 7, 7]
    last, found = 1000, []
    for width in widths + [generator.randrange(8) for _ in range(100)] + [5] * 8:
        before = window.width
        kept = [level[: len(level) - max(0, before - width)] for level in window.levels] if width else []
        window.resize(width)
        assert window.width == width
        assert all(level[: len(old)] == old for level, old in zip(window.levels, kept, strict=False))
        scratch = window.scratch()
        if scratch is not None:
            for row, offset in enumerate(scratch.offsets.tolist()):
                seen = sorted(scratch.offsets[scratch.mask[row]].tolist())
                assert seen == list(range(1, offset + 1))
            successors = last + scratch.offsets[scratch.outputs] + 1
            found = window.advance(last, successors.tolist())
        last += 1
    assert len(found) == 5
    for ngram in found:
        assert list(ngram) == list(range(ngram[0], ngram[0] + 4))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((15, 5, 15), r"drafter\.window=15 .*up to 120 rows .*at most 64; use at most drafter\.guesses=14"),
        ((17, 4, 5), r"drafter\.window=17 .*up to 66 rows .*use drafter\.window=16 or auto"),
        (("auto", 5, 16), r"drafter\.window=auto .*at most drafter\.guesses=14"),
        (("auto", 40, 1), "use a smaller drafter.ngram"),
    ],
)
def test_sizes_that_exceed_the_rows_of_a_pass_are_refused(sizes: tuple, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LookaheadDrafter(*sizes)
    LookaheadDrafter(16, 4, 5)
    LookaheadDrafter(7, 5, 7)


def simulated(drafter: LookaheadDrafter, cost: PassCost, next_token: Callable[[int], int], steps: int) -> float:
    """Return tokens per time over autoregressive decoding, if ``next_token`` is the model and the window guesses 9."""
    if drafter.chooses_size:
        drafter.use(cost)
    tokens, milliseconds = [1, 2, 3], 0.0
    drafter.begin(torch.tensor(tokens))
    for _ in range(steps):
        draft = drafter.propose(Context(tokens, 3, Sampling(), torch.Generator()), 20)
        logits = None if draft.scratch is None else torch.eye(10)[[9] * len(draft.scratch.outputs)]
        milliseconds += float(cost(np.array([draft.rows]), len(tokens))[0])
        path: list[int] = []
        emitted = [next_token(len(tokens))]
        while following := [
            node for node in draft.children(path[-1] if path else ROOT) if draft.tokens[node] == emitted[-1]
        ]:
            path.append(following[0])
            emitted.append(next_token(len(tokens) + len(path)))
        drafter.observe(StepResult(draft, emitted, path, torch.zeros(1, 1), logits))
        tokens = tokens + emitted
    return (len(tokens) - 3) / milliseconds * float(cost(np.array([1]), 0)[0])


def test_useless_guesses_leave_the_speed_of_autoregressive_decoding() -> None:
    """The pool is full of n-grams of random text, and the window's are wrong."""
    generator = random.Random(0)
    text = [generator.randrange(8) for _ in range(4000)]
    drafter = LookaheadDrafter(guesses=5)
    flat = PassCost([1, 64], [10], [[10.0, 10.0]])
    assert simulated(LookaheadDrafter(5, 4, 5), STEEP, text.__getitem__, 1000) < 0.75
    assert simulated(drafter, STEEP, text.__getitem__, 1000) >= 0.97
    assert max(drafter.notes()["window"][-200:]) <= 1
    # Free rows are all used.
    assert simulated(drafter, flat, text.__getitem__, 200) >= 1.1
    assert min(drafter.notes()["window"][20:]) == 16


def test_right_guesses_are_verified_where_rows_are_expensive() -> None:
    """Text that repeats itself after forty tokens is pooled; the window adds nothing."""
    drafter = LookaheadDrafter()
    speed = simulated(drafter, STEEP, lambda position: position % 40 + 10, 300)
    # Three right tokens per step are worth 4 / (1 + 3 * 0.065) = 3.3.
    assert speed >= 0.9 * 4 / (1 + 3 * 0.065)


@pytest.mark.parametrize("cost", [STEEP, PassCost([1, 64], [10], [[10.0, 12.0]])])
def test_automatic_sizes_leave_the_output_as_it_is(cost: PassCost) -> None:
    accepted, widths = 0, set()
    for seed in (0, 1, 2, 3, 5, 6):  # two tokens of seed 4's output are equally likely but for float32's rounding
        model = random_transformer(tiny_config(vocab_size=48, num_layers=2), seed, torch.float32)
        prompt = torch.randint(0, 48, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        verifier, drafter = FP16Verifier(model, Setup(128)), LookaheadDrafter()
        drafter.use(cost)
        limits = Limits(64, 2048, frozenset())
        found = decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())
        expected = decode(prompt, NoneDrafter(), verifier, Greedy(), Sampling(), limits, torch.Generator())
        assert found.tokens == expected.tokens
        accepted += sum(found.accepted)
        widths |= set(drafter.notes()["window"])
        assert len(drafter.notes()["window"]) == len(found.emitted)
    assert accepted > 50
    assert len(widths) > 1


@pytest.mark.parametrize("gain", [0.0, 0.05, 0.3, 0.8])
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.65])
def test_the_width_is_near_the_best_fixed_one(gain: float, slope: float) -> None:
    """Windows contribute ``gain`` log2(1 + W) tokens per step: judged by the expected tokens per millisecond."""
    cost = PassCost([1, 64], [10], [[10.0, 10.0 + 63 * slope]])
    rows = np.array([window_rows(width, 4) for width in range(17)])
    contributed = gain * np.log2(1 + np.arange(17))
    generator, size = random.Random(0), WindowSize(cost, rows.tolist())
    chosen = []
    for _ in range(800):
        chosen.append(size.choose(10))
        expected = contributed[chosen[-1]]
        size.add(0, int(expected) + (generator.random() < expected % 1), 1)
    times = cost(1 + rows, 10)
    best = ((1 + contributed) / times).max()
    assert (1 + contributed[chosen]).sum() / times[chosen].sum() >= 0.96 * best


def test_a_window_that_becomes_useful_is_noticed() -> None:
    rows = [window_rows(width, 4) for width in range(17)]
    size = WindowSize(STEEP, rows)
    for _ in range(400):
        size.choose(10)
        size.add(0, 0, 1)
    assert size.choose(10) == 0
    late = []
    for _ in range(600):
        late.append(size.choose(10))
        size.add(0, 2 if late[-1] else 0, 1)
    assert min(late[-100:]) >= 1


def test_tree_size_maximizes_tokens_per_millisecond() -> None:
    """By trying every size; a step in the cost, as between kernels, may make more tokens worthwhile than fewer."""
    assert TreeSize(PassCost([1, 64], [1], [[10.0, 73.0]])).choose([0.5, 0.25, 0.05], 0) == 2
    generator = random.Random(0)
    for _ in range(300):
        times = sorted(10 + 10 * generator.random() for _ in range(12))
        cost = PassCost(list(range(1, 13)), [1], [times])
        probabilities = sorted((generator.random() for _ in range(8)), reverse=True)
        scratch = generator.randrange(4)
        rates = [(1 + sum(probabilities[:size])) / times[scratch + size] for size in range(9)]
        assert TreeSize(cost).choose(probabilities, 0, scratch) == rates.index(max(rates))


def test_tree_size_tries_one_token_more_for_one_percent_of_the_time() -> None:
    """A row costs 6.5 % of a pass, and no token is worth it: one is verified in every seventh step."""
    size = TreeSize(STEEP)
    chosen = [size.choose([0.01, 0.001], 0) for _ in range(650)]
    assert set(chosen) == {0, 1}
    assert sum(chosen) == 650 // 7


def test_most_probable_nodes_form_a_tree() -> None:
    """Rates are conditional: the path a b (0.5, 0.9) is worth more than its sibling c (0.4)."""
    tokens, parents = [1, 2, 3], [ROOT, 0, ROOT]
    ranked = by_probability(parents, [0.5, 0.9, 0.4])
    assert ranked == [(0.5, 0), (0.45, 1), (0.4, 2)]
    assert subtree(tokens, parents, [1, 0]) == ([1, 2], [ROOT, 0])
    assert subtree(tokens, parents, [2, 0]) == ([1, 3], [ROOT, ROOT])


def test_rates_of_nodes_are_those_of_their_last_fifty_tries() -> None:
    rates = NodeRates(weight=2.0)
    kind = Kind(("a",), 0.5)
    assert rates.rate(kind) == 0.5
    outcomes = [True, False, False]
    for accepted in outcomes:
        rates.add(kind, accepted)
    weights = [2 * 0.98**3, 0.98**2, 0.98, 1.0]
    assert rates.rate(kind) == pytest.approx(float(np.average([0.5, 1, 0, 0], weights=weights)))
    assert rates.rate(Kind(("b",), 0.25)) == 0.25
