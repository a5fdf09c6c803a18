"""Compares the suffix automaton and its drafts with linear searches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.decoding.draft import ROOT, merge_into_tree
from quasar.drafters._continuations import Match, scored_tree
from quasar.drafters._suffix_automaton import MATCH_LENGTHS, PLACES, AutomatonIndex, SuffixAutomaton
from quasar.drafters.base import Resources
from quasar.drafters.suffix_automaton import SuffixAutomatonDrafter
from quasar.errors import RequestError
from tests.test_drafters import RUNS, SHORT_TEXTS, context, grown, slow_choice


@settings(max_examples=1000, deadline=None)
@given(
    SHORT_TEXTS,
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), max_size=3),
    st.integers(1, 3),
    st.tuples(st.integers(1, 8), st.integers(0, 8)),
    st.sampled_from([None, 0.5, 1.0, 2.0]),
    st.sampled_from(["recent", "frequent"]),
    st.integers(1, 3),
)
def test_automaton_drafts_equal_a_linear_search(
    tokens: list[int],
    texts: list[list[int]],
    n_min: int,
    lengths: tuple[int, int],
    factor: float | None,
    match: str,
    branches: int,
) -> None:
    """The longest match of any length in the sequence or in a remembered text, and what followed it there."""
    drafter = SuffixAutomatonDrafter(lengths[0], match, branches, n_min, factor, scope="session")
    for number, text in enumerate(texts):  # conversations of the session: a prompt of its own and the text as output
        drafter.begin(torch.tensor([100 + number]))
        drafter.propose(context([100 + number, *text]), 5)
    draft = grown(drafter, tokens, lengths[1])

    size, ends = slow_longest_match(tokens, tokens)
    followers = [endless(tokens[end:]) for end in ends]
    remembered = max((slow_longest_match(text, tokens)[0] for text in texts), default=0)
    if remembered > size:
        size = remembered
        found = [(text, slow_longest_match(text, tokens)) for text in texts]
        followers = [text[end:] for text, (longest, ends) in found if longest == size for end in ends]
    length = min(lengths)
    if factor is not None:
        length = min(length, max(1, int(factor * size)))
    paths = [follower[:length] for follower in reversed(followers[-PLACES:]) if follower[:length]]
    expected = slow_choice(paths, match, branches) if size >= n_min else []
    assert (draft.tokens, draft.parents) == merge_into_tree([tuple(path) for path in expected])


def endless(tokens: list[int]) -> list[int]:
    """A continuation that reaches the end of the text goes on from its own beginning."""
    return tokens * 8


def slow_longest_match(text: list[int], tokens: list[int]) -> tuple[int, list[int]]:
    """Return the length of the longest suffix of ``tokens`` that occurs earlier in ``text``, and all its places."""
    for size in range(len(tokens), 0, -1):
        ends = [end for end in range(size, len(text) + 1) if text[end - size : end] == tokens[len(tokens) - size :]]
        if text is tokens:
            ends.remove(len(tokens))
        if ends:
            return size, ends
    return 0, []


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 3), max_size=60))
def test_suffix_automaton_equals_a_linear_search(tokens: list[int], memory: list[int]) -> None:
    own, other = SuffixAutomaton(), SuffixAutomaton()
    other.extend(memory)
    cursor = 0, 0
    for end in range(1, len(tokens) + 1):
        own.append(tokens[end - 1])
        cursor = other.step(*cursor, tokens[end - 1])
        seen = tokens[:end]
        size, ends = slow_longest_match(seen, seen)
        found = own.own_match()
        assert (found.length, found.places) == (size, ends[: -PLACES - 1 : -1])
        size, ends = slow_longest_match(memory, seen)
        found = other.match(*cursor)
        assert (found.length, found.places) == (size, ends[: -PLACES - 1 : -1])


@settings(max_examples=100, deadline=None)
@given(RUNS)
def test_suffix_automaton_in_runs_of_one_token(tokens: list[int]) -> None:
    """There the places of short matches may be older ones; the match is the longest, and they are places of it."""
    automaton = SuffixAutomaton()
    for end, token in enumerate(tokens, start=1):
        automaton.append(token)
        if end % 8 and end < len(tokens):
            continue
        seen = tokens[:end]
        size, ends = slow_longest_match(seen, seen)
        found = automaton.own_match()
        assert found.length == size
        assert (not found.places) == (not ends)
        assert set(found.places) <= set(ends)
        assert found.places == sorted(found.places, reverse=True)


def test_suffix_automaton_stays_small_and_fast_in_long_runs() -> None:
    """At most two states per token, and a bounded number of refreshed places, in the worst texts."""
    for tokens in ([1] * 3000, [1, 2] * 1500, [1] * 1500 + [2] + [1] * 1500):
        automaton = SuffixAutomaton()
        automaton.extend(tokens)
        assert len(automaton._next) <= 2 * len(tokens)
        assert max(map(len, automaton._ends)) <= PLACES
    automaton = SuffixAutomaton()
    automaton.extend([1] * 3000)
    assert automaton.own_match().length == 2999


def test_suffix_automaton_adapts_the_length_to_the_match() -> None:
    drafter = SuffixAutomatonDrafter(num_tokens=8, match="recent", length_factor=2.0)
    story = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert grown(drafter, [*story, 30, 2], 9).tokens == [3, 4]
    assert grown(drafter, [*story, 30, 2, 3], 9).tokens == [4, 5, 6, 7]
    assert grown(drafter, [*story, 30, 1, 2, 3, 4], 9).tokens == [5, 6, 7, 8, 9, 10, 11, 30]
    fixed = SuffixAutomatonDrafter(num_tokens=3, match="recent", length_factor=None, n_min=2)
    assert grown(fixed, [*story, 30, 2, 3], 9).tokens == [4, 5, 6]
    assert grown(fixed, [*story, 30, 2], 9).tokens == []


def test_session_scope_offers_outputs_of_other_conversations_only() -> None:
    drafter = SuffixAutomatonDrafter(num_tokens=3, scope="session")
    begin = lambda prompt: drafter.begin(torch.tensor(prompt))  # noqa: E731
    begin([1, 2])
    drafter.propose(context([1, 2, 40, 41, 42, 43, 44]), 5)
    begin([1, 2])  # the same prompt once more must not find its own answer
    assert drafter.propose(context([1, 2, 40, 41]), 5).tokens == []
    begin([1, 2, 40, 41, 3])  # nor must its second turn, beyond what the turn itself holds
    assert drafter.propose(context([1, 2, 40, 41, 3, 42]), 5).tokens == []
    begin([9])
    assert drafter.propose(context([9, 41, 42]), 5).tokens == [43, 44]


def test_corpus_scope_reads_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("abcdefgh")
    drafter = SuffixAutomatonDrafter(num_tokens=4, scope="corpus", corpus=str(file))
    encode = lambda text: [ord(letter) for letter in text]  # noqa: E731
    drafter.prepare(Resources(None, encode, None, lambda: None, {}))  # type: ignore[arg-type]
    drafter.begin(torch.tensor([1]))
    assert drafter.propose(context([1, *encode("cd")]), 9).tokens == encode("efgh")
    missing = SuffixAutomatonDrafter(scope="corpus", corpus=str(tmp_path / "none.txt"))
    with pytest.raises(RequestError, match=r"drafter\.corpus=.*none\.txt: not a readable text file"):
        missing.prepare(Resources(None, encode, None, lambda: None, {}))  # type: ignore[arg-type]


def test_in_a_loop_a_draft_goes_on_from_the_beginning() -> None:
    for match in ("recent", "scored"):
        assert grown(SuffixAutomatonDrafter(num_tokens=9, match=match), [1, 2] * 6, 9).tokens == [1, 2] * 4 + [1]


@settings(max_examples=500, deadline=None)
@given(SHORT_TEXTS, SHORT_TEXTS)
def test_matches_are_the_longest_suffixes_with_different_places(tokens: list[int], remembered: list[int]) -> None:
    index = AutomatonIndex()
    index.memorize(remembered)
    index.begin(tokens)
    expected = []
    for text in (tokens, remembered):
        last = len(text) - (text is tokens)
        own: list[tuple[int, bool, list[int]]] = []
        kept: list[int] = []
        for size in range(len(tokens), 0, -1):
            ends = [end for end in range(size, last + 1) if text[end - size : end] == tokens[len(tokens) - size :]]
            if len(ends) > len(kept):
                # Where the match is not the longest, one of the places that are kept is the present one.
                places = PLACES - (text is tokens and bool(kept))
                own.append((size, text is tokens, ends[::-1][:places]))
                kept = ends
        expected += own[:MATCH_LENGTHS]
    found = [(match.length, match.text is index._own.tokens, match.places) for match in index.matches()]
    assert sorted(found) == sorted(expected)
    assert [length for length, *_ in found] == sorted((length for length, *_ in found), reverse=True)


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.integers(-1, 2), min_size=2, max_size=30),
    st.sets(st.integers(1, 28), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.3, 0.6]),
    st.booleans(),
)
def test_scored_tree_has_the_most_probable_tokens(
    text: list[int], at: set[int], size: int, deepest: int, least: float, loops: bool
) -> None:
    """By enumeration: the probability of every path is the product of the relative frequencies of its tokens."""
    places = sorted((place for place in at if place <= len(text)), reverse=True)
    if not places:
        return
    followers = []
    for place in places:
        rest = text[place:] * (20 if loops else 1)
        rest = rest[: rest.index(-1)] if -1 in rest else rest
        followers.append(tuple(rest[:deepest]))
    probabilities = {(): 1.0}
    for depth in range(1, deepest + 1):
        for path in dict.fromkeys(follower[:depth] for follower in followers if len(follower) >= depth):
            among = sum(follower[: depth - 1] == path[:-1] for follower in followers)
            probabilities[path] = probabilities[path[:-1]] * sum(f[:depth] == path for f in followers) / among
    expected = sorted((value for path, value in probabilities.items() if path and value >= least), reverse=True)[:size]

    tree = scored_tree(Match(1, text, places, loops), size, deepest, least)
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    assert len(set(paths)) == len(paths)
    assert [probabilities[path] for path in paths] == pytest.approx(expected)
    assert tree.score == pytest.approx(sum(expected))


def test_scored_tree_prefers_frequent_continuations() -> None:
    """The example of the docstring, with 9 as the token before: a b, a c, a b, d."""
    a, b, c, d = 1, 2, 3, 4
    text = [9, a, b, 9, a, c, 9, a, b, 9, d]
    tree = scored_tree(Match(1, text, [10, 7, 4, 1]), 4, 2, 0.0)
    assert (tree.tokens, tree.parents, tree.score) == ([a, b, d, c], [ROOT, 0, ROOT, 0], pytest.approx(1.75))
    assert scored_tree(Match(1, text, [10, 7, 4, 1]), 4, 2, 0.3).tokens == [a, b]
    assert scored_tree(Match(1, text, [10, 7, 4, 1]), 3, 2, 0.0).score == pytest.approx(1.5)


def test_the_draft_is_the_tree_with_the_highest_score() -> None:
    """After "1 2" came 3 once; after 2 alone came 3 once and 4 three times. The longer match promises more tokens."""
    text = [1, 2, 3, 5, 6, 7, 2, 4, 2, 4, 2, 4, 9, 1, 2]
    drafter = SuffixAutomatonDrafter(length_factor=2.0)
    assert grown(drafter, text, 9).tokens == [3, 5, 6, 7]  # probability 1 each, 4 in all
    short = SuffixAutomatonDrafter(num_tokens=1)
    # One token each: the longer match is sure of it, and so more than three of four.
    assert grown(short, text, 9).tokens == [3]
    assert grown(drafter, text, 2).tokens == [3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "corpus"}, r"drafter\.scope=corpus with drafter\.corpus=None"),
        ({"corpus": "x"}, r"drafter\.scope=prompt with drafter\.corpus=x"),
        ({"branches": 2}, r"drafter\.branches=2 with drafter\.match=scored"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SuffixAutomatonDrafter(**options)
