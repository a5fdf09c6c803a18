"""Indices of n-grams forget the tokens that turned out not to stand: they are then as if they had never seen them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.decoding.draft import Context, Draft, StepResult
from quasar.decoding.sampling import Sampling
from quasar.drafters._suffix_automaton import REMOVABLE, AutomatonIndex, SuffixAutomaton
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.drafters.ngram import LookupIndex
from quasar.model.kv_cache import KVCache
from quasar.model.loading import tiny_config

# Texts that repeat themselves, each of which is appended after some tokens of the text before were removed.
EDITS = st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 2), max_size=15)), min_size=1, max_size=8)


def edited(tokens: list[int], removed: int, added: list[int]) -> tuple[int, list[int]]:
    """Return the number of tokens that stay, and the text after the edit."""
    length = max(1, len(tokens) - removed)
    return length, tokens[:length] + added


@settings(max_examples=300, deadline=None)
@given(EDITS)
def test_a_rewound_automaton_is_one_that_never_saw_the_rest(edits: list[tuple[int, list[int]]]) -> None:
    tokens, automaton = [1], SuffixAutomaton()
    automaton.append(1)
    for removed, added in edits:
        length, tokens = edited(tokens, removed, added)
        automaton = automaton.first(length)
        automaton.extend(tokens[length:])
        fresh = SuffixAutomaton()
        fresh.extend(tokens)
        for name in ("tokens", "_next", "_link", "_length", "_ends", "_last", "_seen"):
            assert getattr(automaton, name) == getattr(fresh, name), name


def test_an_automaton_forgets_more_tokens_than_it_can_remove_one_by_one() -> None:
    tokens = [number % 7 * (number % 3) for number in range(3 * REMOVABLE)]
    for length in (2 * REMOVABLE, 2 * REMOVABLE - 1, 5):
        automaton, fresh = SuffixAutomaton(), SuffixAutomaton()
        automaton.extend(tokens)
        fresh.extend(tokens[:length])
        assert vars(automaton.first(length))["_next"] == fresh._next
        assert automaton.first(length).tokens == tokens[:length]


@settings(max_examples=200, deadline=None)
@given(EDITS, st.lists(st.integers(0, 2), max_size=20))
def test_a_rewound_index_of_several_texts_matches_like_a_fresh_one(
    edits: list[tuple[int, list[int]]], memory: list[int]
) -> None:
    tokens, index = [1], AutomatonIndex()
    index.memorize(memory)
    index.begin(tokens)
    for removed, added in edits:
        length, tokens = edited(tokens, removed, added)
        index.rewind(length)
        index.extend(tokens)
        fresh = AutomatonIndex()
        fresh.memorize(memory)
        fresh.begin(tokens)
        assert index.match() == fresh.match()


@settings(max_examples=300, deadline=None)
@given(EDITS)
def test_a_rewound_lookup_is_one_that_never_saw_the_rest(edits: list[tuple[int, list[int]]]) -> None:
    tokens, index = [1], LookupIndex(range(3, 0, -1))
    index.begin(tokens)
    for removed, added in edits:
        length, tokens = edited(tokens, removed, added)
        index.rewind(length)
        index.extend(tokens)
        fresh = LookupIndex(range(3, 0, -1))
        fresh.begin(tokens)
        assert index._followers == fresh._followers
        assert index.match() == fresh.match()


def test_lookahead_forgets_the_ngrams_of_what_does_not_stand() -> None:
    drafter = LookaheadDrafter(window=2, ngram=3, guesses=4)
    drafter.begin(torch.tensor([1]))
    context = Context([5, 1, 2, 5, 3, 4, 5], 1, Sampling(), torch.Generator())
    assert drafter.propose(context, 5).tokens == [3, 4, 1, 2]
    drafter.observe(StepResult(Draft(), [9], [], torch.zeros(1, 1), None))
    # Only 5 1 2 5 stands, so 5 3 4 was never said; then comes 5 7.
    drafter.rewind(4)
    context.tokens = [5, 1, 2, 5, 7, 8, 5]
    assert drafter.propose(context, 5).tokens == [7, 8, 1, 2]


def test_a_cache_keeps_only_tokens_that_it_has() -> None:
    cache = KVCache(tiny_config(), 16, torch.float32, "cpu")
    cache.commit(range(5))
    cache.rewind(3)
    assert cache.length == 3
    with pytest.raises(ValueError, match="3 committed slots, so it cannot keep the first 4"):
        cache.rewind(4)
