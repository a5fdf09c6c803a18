"""Drafters against slow, obvious versions of themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quasar.draft import ROOT, Context, Draft, StepResult
from quasar.drafters.layerskip import LayerSkipDrafter
from quasar.drafters.lookahead import LookaheadDrafter, merge_into_tree, window_layout
from quasar.drafters.ngram import NgramDrafter
from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.sampling import Sampling
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier


def context(tokens: list[int], prompt_length: int = 1) -> Context:
    return Context(tokens, prompt_length, Sampling(), torch.Generator())


def slow_prompt_lookup(tokens: list[int], n_max: int, n_min: int, length: int) -> list[int]:
    for size in range(n_max, n_min - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                return tokens[start + size : start + size + length]
    return []


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=40),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 8),
)
def test_ngram_equals_a_linear_search(tokens: list[int], n_max: int, n_min: int, length: int, budget: int) -> None:
    n_min = min(n_min, n_max)
    drafter = NgramDrafter(num_tokens=length, n_max=n_max, n_min=n_min)
    drafter.begin(torch.tensor(tokens[:1]), None)  # type: ignore[arg-type]
    # The context grows as decoding does, a few tokens at a time.
    for end in range(2, len(tokens) + 1, 3):
        drafter.propose(context(tokens[:end]), 5)
    draft = drafter.propose(context(tokens), budget)
    assert draft.tokens == slow_prompt_lookup(tokens, n_max, n_min, min(length, budget))
    assert draft.is_chain


def test_ngram_prefers_the_longer_match_and_the_latest_place() -> None:
    drafter = NgramDrafter(num_tokens=2, n_max=2, n_min=1)
    drafter.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
    assert drafter.propose(context([1, 2, 30, 31, 9, 2, 40, 41, 1, 2]), 5).tokens == [30, 31]
    drafter.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
    assert drafter.propose(context([1, 2, 30, 31, 1, 2, 50, 51, 1, 2]), 5).tokens == [50, 51]


def test_new_sequence_forgets_the_last_one() -> None:
    drafter = NgramDrafter()
    drafter.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
    drafter.propose(context([7, 8, 9, 7]), 5)
    drafter.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
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
    drafter.begin(torch.tensor(tokens), None)  # type: ignore[arg-type]
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
    drafter.begin(torch.tensor([1]), None)  # type: ignore[arg-type]
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
        LayerSkipDrafter(**options).begin(torch.tensor([1]), FP16Verifier(tiny, Setup()))


def test_drafters_refuse_lengths_that_draft_nothing() -> None:
    for make in (NgramDrafter, LayerSkipDrafter):
        for length in (0, -3):
            with pytest.raises(ValidationError, match="greater than 0"):
                make(num_tokens=length)
    with pytest.raises(RequestError, match=r"drafter\.n_min=4 is larger than drafter\.n_max=3"):
        NgramDrafter(n_min=4)
