"""Compares drafters with slow, obvious implementations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quasar.decoding.draft import ROOT, Context, Draft, StepResult, merge_into_tree
from quasar.decoding.loop import Generation
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopwatch import DECODE_PHASES
from quasar.drafters._layer_search import search_skipped_layers
from quasar.drafters.base import Drafter
from quasar.drafters.layerskip import LayerSkipDrafter
from quasar.drafters.lookahead import LookaheadDrafter, window_layout
from quasar.drafters.ngram import LOOKUP_PLACES, NgramDrafter
from quasar.errors import RequestError
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.compose import resources_for


def context(tokens: list[int], prompt_length: int = 1) -> Context:
    return Context(tokens, prompt_length, Sampling(), torch.Generator())


def slow_prompt_lookup(
    tokens: list[int], n_max: int, n_min: int, length: int, match: str = "recent", branches: int = 1
) -> list[list[int]]:
    """Return the continuations by linear search, in the order of the text."""
    for size in range(n_max, n_min - 1, -1):
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[len(tokens) - size :]]
        found = [tokens[end : end + length] for end in reversed(ends[-LOOKUP_PLACES:])]
        if found:
            return [path for path in slow_choice(found, match, branches) if path]
    return []


def slow_first(tokens: list[int], n_max: int, n_min: int, length: int) -> list[int]:
    """Return what followed the earliest occurrence of the longest suffix, as vLLM's proposer does."""
    for size in range(n_max, n_min - 1, -1):
        for end in range(size, len(tokens)):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                return tokens[end : end + length]
    return []


def slow_choice(found: list[list[int]], match: str, branches: int) -> list[list[int]]:
    """``found``: continuations, the latest first."""
    chosen: list[list[int]] = []
    while len(chosen) < branches:
        fresh = [path for path in found if not any(earlier[: len(path)] == path for earlier in chosen)]
        if not fresh:
            break
        longest = max(map(len, fresh))
        if match == "recent":
            chosen.append(next(path for path in fresh if len(path) == longest))
            continue
        ordered = [path for size in range(longest, 0, -1) for path in fresh if len(path) == size]
        path: list[int] = []
        while following := [other[len(path)] for other in ordered if other[: len(path)] == path != other]:
            path = [*path, max(following, key=lambda token: (following.count(token), -following.index(token)))]
        chosen.append(path)
    return chosen


def grown(drafter: Drafter, tokens: list[int], budget: int) -> Draft:
    """Return the draft after a context that grew by a few tokens at a time, as in decoding."""
    drafter.begin(torch.tensor(tokens[:1]))
    for end in range(2, len(tokens) + 1, 3):
        drafter.propose(context(tokens[:end]), 5)
    return drafter.propose(context(tokens), budget)


# Texts with few different tokens, which repeat themselves, and texts with long runs of one token.
SHORT_TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60)), min_size=1, max_size=4).map(
    lambda runs: [token for token, length in runs for _ in range(length)]
)


@settings(max_examples=1000, deadline=None)
@given(
    SHORT_TEXTS | RUNS,
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 6),
    st.integers(0, 8),
    st.sampled_from(["recent", "frequent"]),
    st.integers(1, 3),
)
def test_ngram_equals_a_linear_search(
    tokens: list[int], sizes: tuple[int, int], length: int, budget: int, match: str, branches: int
) -> None:
    n_max, n_min = max(sizes), min(sizes)
    drafter = NgramDrafter(num_tokens=length, n_max=n_max, n_min=n_min, match=match, branches=branches)
    draft = grown(drafter, tokens, budget)
    expected = slow_prompt_lookup(tokens, n_max, n_min, min(length, budget), match, branches)
    assert (draft.tokens, draft.parents) == merge_into_tree([tuple(path) for path in expected])


@settings(max_examples=500, deadline=None)
@given(SHORT_TEXTS | RUNS, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 6), st.integers(0, 8))
def test_ngram_first_equals_a_linear_search(
    tokens: list[int], sizes: tuple[int, int], length: int, budget: int
) -> None:
    drafter = NgramDrafter(num_tokens=length, n_max=max(sizes), n_min=min(sizes), match="first")
    draft = grown(drafter, tokens, budget)
    assert draft.is_chain
    assert draft.tokens == slow_first(tokens, max(sizes), min(sizes), min(length, budget))


def test_ngram_in_a_constant_run_offers_a_full_draft() -> None:
    assert grown(NgramDrafter(num_tokens=4), [7] * 12, 9).tokens == [7] * 4


def test_ngram_matches_recent_or_frequent() -> None:
    tokens = [5, 1, 9, 5, 1, 8, 5, 2, 9, 5]
    assert grown(NgramDrafter(num_tokens=2, n_max=1), tokens, 9).tokens == [2, 9]
    assert grown(NgramDrafter(num_tokens=2, n_max=1, match="frequent"), tokens, 9).tokens == [1, 8]
    assert grown(NgramDrafter(num_tokens=2, n_max=1, match="first"), tokens, 9).tokens == [1, 9]
    tree = grown(NgramDrafter(num_tokens=2, n_max=1, branches=2), tokens, 9)
    assert (tree.tokens, tree.parents) == ([2, 9, 1, 8], [ROOT, 0, ROOT, 2])


def test_ngram_prefers_the_longer_match_and_the_latest_place() -> None:
    drafter = NgramDrafter(num_tokens=2, n_max=2, n_min=1)
    drafter.begin(torch.tensor([1]))
    assert drafter.propose(context([1, 2, 30, 31, 9, 2, 40, 41, 1, 2]), 5).tokens == [30, 31]
    drafter.begin(torch.tensor([1]))
    assert drafter.propose(context([1, 2, 30, 31, 1, 2, 50, 51, 1, 2]), 5).tokens == [50, 51]


def test_new_sequence_forgets_the_last_one() -> None:
    drafter = NgramDrafter()
    drafter.begin(torch.tensor([1]))
    drafter.propose(context([7, 8, 9, 7]), 5)
    drafter.begin(torch.tensor([1]))
    assert drafter.propose(context([1, 2, 7]), 5).tokens == []


def test_lookahead_window_layout() -> None:
    """W = 3, N = 4: two columns of the oldest iterate, three of each newer one; see figure 2 (b) of the paper."""
    offsets, mask, outputs = window_layout((2, 3, 3))
    assert offsets.tolist() == [1, 2, 1, 2, 3, 2, 3, 4]
    sees = [set(row.nonzero().flatten().tolist()) for row in mask]
    assert sees[:2] == [{0}, {0, 1}]
    assert sees[2:5] == [{2}, {0, 3}, {0, 1, 4}]
    assert sees[5:] == [{2, 5}, {0, 3, 6}, {0, 1, 4, 7}]
    assert outputs.tolist() == [5, 6, 7]


@pytest.mark.parametrize(("window", "ngram"), [(3, 3), (4, 4), (5, 3), (3, 5), (1, 3)])
def test_lookahead_window_rows_stand_at_consecutive_positions(window: int, ngram: int) -> None:
    """Whatever a row sees stands at positions 1, 2, … up to its own: every row continues a real sequence."""
    for warm in range(1, ngram):
        if warm < ngram - 1:
            lengths = [window + ngram - 2 - warm] + [window + ngram - 1 - warm] * (warm - 1)
        else:
            lengths = [window - 1] + [window] * (ngram - 2)
        offsets, mask, _ = window_layout(tuple(lengths))
        for row in range(len(mask)):
            seen = sorted(offsets[mask[row]].tolist())
            assert seen == list(range(1, int(offsets[row]) + 1)), (lengths, row)


def test_lookahead_collects_the_ngrams_of_its_diagonals() -> None:
    """A model that knows every position's number: once the random start is used up, n-grams are consecutive runs."""
    drafter = LookaheadDrafter(window=4, ngram=3, guesses=3, pool_from_prompt=False)
    tokens = [10, 11]
    drafter.begin(torch.tensor(tokens))
    for _ in range(8):
        draft = drafter.propose(context(tokens), 10)
        assert draft.scratch is not None
        successors = tokens[-1] + draft.scratch.offsets[draft.scratch.outputs] + 1
        logits = torch.nn.functional.one_hot(successors, 200).float()
        emitted = [tokens[-1] + 1]
        tokens = tokens + emitted
        drafter.observe(StepResult(draft, emitted, [], logits[:1], logits))
    for first in range(14, 22):
        assert list(drafter._pool[first])[-1] == (first + 1, first + 2)
    assert drafter.propose(context(tokens), 10).tokens[:2] == [tokens[-1] + 1, tokens[-1] + 2]


def test_lookahead_guesses_begin_with_the_last_token_newest_first() -> None:
    drafter = LookaheadDrafter(window=2, ngram=3, guesses=2)
    drafter.begin(torch.tensor([1]))
    draft = drafter.propose(context([5, 1, 2, 5, 1, 3, 5, 7, 8, 5]), 10)
    # After 5 came 1 2, then 1 3, then 7 8; the pool keeps two.
    assert draft.tokens == [7, 8, 1, 3]
    assert draft.parents == [ROOT, 0, ROOT, 2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=6))
def test_tree_holds_every_path_once(paths: list[tuple[int, ...]]) -> None:
    tokens, parents = merge_into_tree(paths)
    draft = Draft(tokens, parents)
    for path in paths:
        node = ROOT
        for token in path:
            matching = [child for child in draft.children(node) if tokens[child] == token]
            assert len(matching) == 1
            node = matching[0]
    assert len(tokens) == len({path[:length] for path in paths for length in range(1, len(path) + 1)})


def test_layerskip_chooses_layers() -> None:
    assert LayerSkipDrafter(exit_layer=2).kept_layers(4) == [0, 1]
    assert LayerSkipDrafter(skip_layers=[1, 2]).kept_layers(4) == [0, 3]
    assert LayerSkipDrafter(skip_ratio=0.5).kept_layers(8) == [0, 2, 5, 7]
    kept = LayerSkipDrafter(skip_ratio=0.25).kept_layers(30)
    assert len(kept) == 30 - 8
    assert {0, 29} <= set(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layer": 4}, r"drafter\.exit_layer=4: the model has 4 layers; exit after 1 to 3"),
        ({"skip_layers": [2, 9]}, r"drafter\.skip_layers names \[9\], but the model's layers are 0 to 3"),
        ({"skip_layers": [0, 1, 2, 3]}, "keep at least one"),
        ({"skip_layers": []}, "skip at least one"),
    ],
)
def test_layerskip_refuses_layers_the_model_lacks(options: dict, message: str, tiny: Transformer) -> None:
    with pytest.raises(RequestError, match=message):
        LayerSkipDrafter(**options).use(FP16Verifier(tiny, Setup()))


def test_layer_search_finds_the_fastest_set_and_measures_none_twice() -> None:
    """The speed is highest if layers 2, 3 and 5 of eight are left out."""
    measured: list[tuple[int, ...]] = []

    def speed(skipped: list[int]) -> float:
        measured.append(tuple(skipped))
        return 100.0 - 10.0 * len(set(skipped) ^ {2, 3, 5})

    found = search_skipped_layers(speed, 8, 80, 0, lambda done, total: None)
    assert (found.skipped, found.tokens_per_second) == ([2, 3, 5], 100.0)
    assert len(measured) == len(set(measured)) == found.tried <= 80
    assert all(0 < len(skipped) < 8 for skipped in measured)
    few = search_skipped_layers(speed, 8, 4, 0, lambda done, total: None)
    assert few.tried == 4


def test_searched_layers_are_cached_by_model_and_verifier(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = FP16Verifier(random_transformer(tiny_config(vocab_size=64), 0, torch.float32), Setup())
    searched: list[list[int]] = []

    def speed(self: LayerSkipDrafter, verifier: object, prompts: list[list[int]], skipped: list[int]) -> float:
        assert [len(prompt) for prompt in prompts] == [50, 90]
        searched.append(skipped)
        return 10.0 + (skipped == [1, 2])

    monkeypatch.setattr(LayerSkipDrafter, "_speed", speed)
    resources = resources_for(verifier, setup)
    for identity, runs in (({"verifier": "a"}, 6), ({"verifier": "a"}, 6), ({"verifier": "b"}, 12)):
        drafter = LayerSkipDrafter(method="search", search_sets=6, search_prompts=2, exit_layer=1)
        drafter.prepare(replace(resources, identity=identity))
        assert len(searched) == runs
        if [1, 2] in searched:
            assert drafter.kept_layers(4) == [0, 3]
        assert drafter.details[0].startswith("skips layers [")


def test_measured_speed_counts_decoded_tokens(setup: Setup) -> None:
    verifier = FP16Verifier(random_transformer(tiny_config(vocab_size=64), 0, torch.float32), Setup())
    drafter = LayerSkipDrafter(search_tokens=8)
    assert drafter._speed(verifier, [[1, 2, 3], [4, 5]], [1]) > 0
    with pytest.raises(RequestError, match=r"drafter\.method=search needs calibration text"):
        LayerSkipDrafter(method="search").prepare(resources_for(verifier, Setup()))


def test_measured_speed_leaves_out_the_first_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first decode with a set of layers, on the longest prompt, compiles and allocates."""
    decoded: list[list[int]] = []

    def decode(prompt: list[int], *others: object) -> Generation:
        decoded.append(prompt)
        milliseconds = 1000.0 if len(decoded) == 1 else 4.0
        return Generation([], len(prompt), "", [], [], [], [8], [], {name: [milliseconds] for name in DECODE_PHASES})

    monkeypatch.setattr("quasar.drafters.layerskip.decode", decode)
    monkeypatch.setattr(LayerSkipDrafter, "use", lambda self, verifier, lent: None)
    speed = LayerSkipDrafter()._speed(None, [[1], [2, 3]], [1])  # type: ignore[arg-type]
    assert decoded == [[2, 3], [1], [2, 3]]
    assert speed == pytest.approx(8 / 16 * 1e3)


def test_drafters_refuse_lengths_that_draft_nothing() -> None:
    for make in (NgramDrafter, LayerSkipDrafter):
        for length in (0, -3):
            with pytest.raises(ValidationError, match="greater than 0"):
                make(num_tokens=length)
    with pytest.raises(RequestError, match=r"drafter\.n_min=4 is larger than drafter\.n_max=3"):
        NgramDrafter(n_min=4)
    with pytest.raises(RequestError, match=r"drafter\.branches=2 with drafter\.match=first"):
        NgramDrafter(match="first", branches=2)
