"""Compares the mixture's trees with linear searches in everything that it has seen."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quasar.decoding.acceptance import Greedy, RejectionSampling
from quasar.decoding.draft import ROOT, Context, Draft, StepResult
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters._next_tokens import Evidence, LogitTokens, RunnersUp, TextTokens, _evidence
from quasar.drafters._pass_cost import PassCost
from quasar.drafters._tree_size import DECAY, MOST_RATE, Kind, RelatedRates, TreeSize, by_probability, subtree
from quasar.drafters.base import FinishedSequence
from quasar.drafters.mixture import LEAST_PROBABILITY, MixtureDrafter, _kind
from quasar.drafters.none import NoneDrafter
from quasar.model.loading import random_transformer, tiny_config
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

VOCABULARY = 48
STEEP = PassCost([1, 64], [10], [[10.0, 10.0 + 0.65 * 63]])


def context(tokens: list[int]) -> Context:
    return Context(tokens, 1, Sampling(), torch.Generator())


def slow_text(tokens: list[int], size: int, most: int) -> list[int]:
    """Return what followed earlier occurrences of the last ``size`` tokens, the latest first and each once."""
    tail = tokens[len(tokens) - size :]
    places = [end for end in range(len(tokens) - 1, size - 1, -1) if tokens[end - size : end] == tail]
    return list(dict.fromkeys(tokens[place] for place in places))[:most]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_text_suggests_what_followed_earlier_occurrences(tokens: list[int], order: int, most: int) -> None:
    source = TextTokens(order, most)
    for end in range(1, len(tokens) + 1, 3):
        source.read(tokens[:end], max(0, end - 3))
    source.read(tokens, len(tokens) - (len(tokens) - 1) % 3)
    expected: dict[int, tuple[str | int, ...]] = {}
    for size in range(min(order, len(tokens)), 0, -1):
        followers = slow_text(tokens, size, most)
        for place, token in enumerate(followers):
            expected.setdefault(token, ("text", size, place, len(followers) == 1))
    found = source.suggest(tuple(tokens[-order:]))
    assert {token: evidence.key for token, evidence in found.items()} == expected


def keys(found: dict[int, Evidence]) -> dict[int, tuple[str | int, ...]]:
    return {token: evidence.key for token, evidence in found.items()}


def test_logits_suggest_what_the_last_pass_found_likely() -> None:
    source = LogitTokens(2, 2)
    source.score((1, 2), [7, 8, 9])
    source.score((3, 2), [5, 7, 9])
    assert keys(source.suggest((1, 2))) == {7: ("logits", 2, 0), 8: ("logits", 2, 1), 5: ("logits", 1, 0)}
    assert keys(source.suggest((9, 2))) == {5: ("logits", 1, 0), 7: ("logits", 1, 1)}
    assert source.suggest((9,)) == {}


def test_runners_up_follow_the_argmax_of_the_last_row() -> None:
    source = RunnersUp(2, 4)
    source.score((1, 2), [3, 4, 5, 6])
    source.score((2, 3), [7, 8, 9, 4])
    assert keys(source.suggest((3, 7))) == {8: ("runners_up", 0), 9: ("runners_up", 1), 4: ("runners_up", 1)}
    assert source.suggest((2, 3)) == {}


def test_late_places_count_as_one_kind() -> None:
    source = LogitTokens(1, 8)
    source.score((1,), list(range(10, 18)))
    assert [key[-1] for key in keys(source.suggest((1,))).values()] == [0, 1, 2, 3, 3, 3, 3, 3]


def test_agreement_of_sources_raises_the_assumed_rate() -> None:
    """The text's second token, at rate 0.4 * 0.35 * 2^-1.5 = 0.0495: its odds times 3, times 4 and times both."""
    text, logits, runners_up = TextTokens(1, 4), LogitTokens(1, 4), RunnersUp(1, 4)
    text.read([1, 7, 1, 8, 1], 0)
    logits.score((1,), [8, 7])
    runners_up.score((1,), [1, 7])
    one, two, three = (source.suggest((1,))[7] for source in (text, logits, runners_up))
    odds = 0.0495 / 0.9505
    expected = [odds * gain / (1 + odds * gain) for gain in (1, 3, 4, 12)]
    kinds = [_kind(evidence) for evidence in ((one,), (one, two), (one, three), (one, two, three))]
    assert [kind.first for kind in kinds] == pytest.approx(expected, abs=1e-4)
    assert len({kind.key for kind in kinds}) == 4


def test_every_tree_has_the_most_probable_paths() -> None:
    """Step by step on a small model: suggestions by linear search over all rows so far, paths by enumeration."""
    order, most = 3, 2
    steps, checked = 0, 0
    for seed in range(3):
        model = random_transformer(tiny_config(vocab_size=VOCABULARY, num_layers=2), seed, torch.float32)
        prompt = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        drafter = MixtureDrafter(num_tokens=12, order=order, candidates=most)
        tokens, rows = [*prompt, 5], []
        verifier = FP16Verifier(model, Setup(128))
        verifier.prefill(torch.tensor(prompt))
        drafter.begin(torch.tensor(prompt))
        for _ in range(25):
            draft = drafter.propose(context(tokens), 3)
            expected = slow_probabilities(drafter, tokens, rows, order, most)
            found = [expected[path] for path in paths_of(draft)]
            assert found == pytest.approx(sorted(expected.values(), reverse=True)[: len(found)])
            assert len(found) == min(12, len(expected))  # rows are free
            scores = verifier.verify(tokens[-1], draft)
            accepted = Greedy().accept(draft, scores, torch.Generator())
            verifier.keep(accepted.path)
            likely = scores.logits.topk(most).indices.tolist()
            paths = [(), *paths_of(draft)]
            ordered = [*range(len(paths)), 0, *(node + 1 for node in accepted.path)]
            rows += [([*tokens, *paths[row]], likely[row]) for row in ordered]
            emitted = [*(draft.tokens[node] for node in accepted.path), accepted.bonus]
            drafter.observe(StepResult(draft, emitted, accepted.path, scores.logits, None))
            tokens = tokens + emitted
            steps, checked = steps + 1, checked + len(found)
    assert checked > 5 * steps


def slow_probabilities(
    drafter: MixtureDrafter, tokens: list[int], rows: list[tuple[list[int], list[int]]], order: int, most: int
) -> dict[tuple[int, ...], float]:
    """Return the estimated probability of every path of at most three tokens that is worth considering."""

    def next_tokens(path: tuple[int, ...]) -> dict[int, float]:
        text: dict[int, Evidence] = {}
        logits: dict[int, Evidence] = {}
        for size in range(order, 0, -1):
            tail = [*tokens, *path][-size:]
            places = [end for end in range(len(tokens) - 1, size - 1, -1) if tokens[end - size : end] == tail]
            followers = list(dict.fromkeys(tokens[place] for place in places))[:most]
            scored = next((likely for row, likely in reversed(rows) if row[-size:] == tail), [])
            for found, name, known in ((text, "text", followers), (logits, "logits", scored)):
                for place, token in enumerate(known):
                    found.setdefault(token, _evidence(name, size, place, len(known) == 1))
        # The last row predicted the last token, and its other tokens may come after it.
        runners_up: dict[int, Evidence] = {}
        if rows and [*tokens, *path][-order:] == tokens[-order:]:
            for place, token in enumerate(rows[-1][1][1:]):
                runners_up[token] = _evidence("runners_up", 0, place, False)
        return {
            token: drafter._pruning.rate(
                _kind(tuple(source[token] for source in (text, logits, runners_up) if token in source))
            )
            for token in {**text, **logits, **runners_up}
        }

    probabilities: dict[tuple[int, ...], float] = {}
    waiting: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while waiting:
        path, probability = waiting.pop()
        for token, rate in next_tokens(path).items():
            if probability * rate >= LEAST_PROBABILITY:
                probabilities[*path, token] = probability * rate
                if len(path) < 2:
                    waiting.append(((*path, token), probability * rate))
    return probabilities


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    assert len(set(paths)) == len(paths)
    return paths


@pytest.mark.parametrize("memory", ["prompt", "session"])
@pytest.mark.parametrize("cost", [STEEP, PassCost([1, 64], [10], [[10.0, 11.0]])])
def test_greedy_output_is_that_of_autoregressive_decoding(memory: str, cost: PassCost) -> None:
    drafter = MixtureDrafter(memory=memory)
    drafter.use(cost)
    accepted = 0
    for seed in (0, 1, 2, 3, 5):  # two tokens of seed 4's output are equally likely but for float32's rounding
        model = random_transformer(tiny_config(vocab_size=VOCABULARY, num_layers=2), seed, torch.float32)
        prompt = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        verifier, limits = FP16Verifier(model, Setup(128)), Limits(60, 2048, frozenset())
        expected = decode(prompt, NoneDrafter(), verifier, Greedy(), Sampling(), limits, torch.Generator())
        found = decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())
        assert found.tokens == expected.tokens
        accepted += sum(found.accepted)
        sampled = decode(
            prompt, drafter, verifier, RejectionSampling(Sampling(1.0)), Sampling(1.0), limits, torch.Generator()
        )
        assert len(sampled.tokens) == 60
    assert accepted > 50


def simulated(drafter: MixtureDrafter, truth: list[int]) -> float:
    """Return the throughput over autoregressive decoding along a text, for rows that cost 6.5 % of a pass."""
    drafter.use(STEEP)
    drafter.begin(torch.tensor(truth[:2]))
    end, milliseconds, emitted = 2, 0.0, 0
    while end < len(truth) - 40:
        draft = drafter.propose(context(truth[:end]), 20)
        milliseconds += float(STEEP(np.array([draft.rows]), 0)[0])
        path: list[int] = []
        while right := [
            node for node in draft.children(path[-1] if path else ROOT) if draft.tokens[node] == truth[end + len(path)]
        ]:
            path.append(right[0])
        logits = torch.rand(len(draft) + 1, VOCABULARY)
        drafter.observe(StepResult(draft, truth[end : end + len(path) + 1], path, logits, None))
        end, emitted = end + len(path) + 1, emitted + len(path) + 1
    return emitted / milliseconds * 10.0


def test_the_search_ends_where_no_further_token_pays() -> None:
    """Along a text with repetitions: the same draft as from all candidates, of which fewer are looked up."""
    generator = random.Random(1)
    passages = [[generator.randrange(VOCABULARY) for _ in range(12)] for _ in range(4)]
    truth = [token for _ in range(30) for token in generator.choice(passages)]
    drafter = MixtureDrafter()
    drafter.use(STEEP)
    drafter.begin(torch.tensor(truth[:2]))
    looked_up = [0, 0]
    for end in range(3, len(truth) - 20, 2):
        draft = drafter.propose(context(truth[:end]), 20)
        trees = [drafter._tree(20, cost) for cost in (0.065, 0.0)]
        rates = [[drafter._pruning.rate(kind) for kind in tree.kinds] for tree in trees]
        sizes = TreeSize(STEEP), TreeSize(STEEP)
        chosen = []
        for tree, own, size in zip(trees, rates, sizes, strict=True):
            ranked = by_probability(tree.parents, own)
            number = size.choose([probability for probability, _ in ranked], end)
            chosen.append(subtree(tree.tokens, tree.parents, [node for _, node in ranked[:number]]))
        assert chosen[0] == chosen[1]
        looked_up = [count + len(tree.tokens) for count, tree in zip(looked_up, trees, strict=True)]
        right = [node for node in draft.children(ROOT) if draft.tokens[node] == truth[end]][:1]
        logits = torch.zeros(len(draft) + 1, VOCABULARY)
        drafter.observe(StepResult(draft, truth[end : end + 1 + len(right)], right, logits, None))
    assert looked_up[0] < 0.7 * looked_up[1]


def test_cost_of_a_row() -> None:
    """10 ms, 0.65 ms for each further row; and a plateau from 2 to 64 rows, where the mean of 63 rows is the least."""
    assert TreeSize(STEEP).row_cost(10) == pytest.approx(0.065)
    assert TreeSize(PassCost([1, 2, 64], [10], [[10.0, 15.0, 15.0]])).row_cost(10) == pytest.approx(0.5 / 63)


def test_related_rates() -> None:
    """2 of 20 tries of one kind were accepted, with older tries fading. Another kind keeps to the common factor."""
    rates, tried, other = RelatedRates(10.0), Kind(("a",), 0.5), Kind(("b",), 0.3)
    kept, assumed, own, total = 10.0, 10.0, 0.0, 0.0
    for index in range(20):
        right = index in (3, 15)
        rates.add(tried, right)
        kept, assumed = 10 + DECAY * (kept - 10) + right, 10 + DECAY * (assumed - 10) + 0.5
        own, total = DECAY * own + right, DECAY * total + 1
    assert rates.rate(other) == pytest.approx(0.3 * kept / assumed)
    assert rates.rate(tried) == pytest.approx((own + 10 * kept / assumed * 0.5) / (total + 10))
    for _ in range(300):
        rates.add(tried, True)
    assert rates.rate(Kind(("c",), 0.9)) == MOST_RATE


def test_text_without_repetition_is_decoded_as_fast_as_autoregressively() -> None:
    generator = random.Random(0)
    assert simulated(MixtureDrafter(), [generator.randrange(VOCABULARY) for _ in range(1500)]) >= 0.97


def test_a_text_that_repeats_itself_is_copied() -> None:
    """Long drafts are right: the best number of tokens per step is that of the budget of twenty."""
    passage = random.Random(0).sample(range(VOCABULARY), 40)
    assert simulated(MixtureDrafter(sources=["text"]), passage * 30) >= 0.75 * 21 / (1 + 20 * 0.065)


def test_what_is_remembered() -> None:
    for memory, kept in (("prompt", False), ("session", True)):
        drafter = MixtureDrafter(memory=memory)
        drafter.begin(torch.tensor([1, 2]))
        drafter.propose(context([1, 2, 3]), 5)
        drafter.begin(torch.tensor([4]))
        assert (drafter.propose(context([4, 2]), 5).tokens[:1] == [3]) == kept
        drafter.start([FinishedSequence([6, 7], [8])])
        drafter.begin(torch.tensor([4]))
        assert drafter.propose(context([4, 2]), 5).tokens == []
        assert (drafter.propose(context([4, 2, 7]), 5).tokens[:1] == [8]) == kept
        assert bool(drafter.details) == kept


@pytest.mark.parametrize(
    "options", [{"num_tokens": 64}, {"order": 0}, {"candidates": 0}, {"sources": []}, {"sources": ["oracle"]}]
)
def test_values_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        MixtureDrafter(**options)
