"""Compares Token Recycling with a slow form of it: a dictionary of candidates, and every row a separate sequence."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from quasar.decoding.acceptance import Greedy, RejectionSampling
from quasar.decoding.draft import ROOT, Context, Draft, StepResult
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import FinishedSequence
from quasar.drafters.none import NoneDrafter
from quasar.drafters.recycling import AdjacencyMatrix, RecyclingDrafter, assumed_rate, static_tree
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

VOCABULARY = 48


def model_of(seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    return random_transformer(tiny_config(vocab_size=VOCABULARY, num_layers=2), seed, dtype)


def prompt_of(seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(seed)).tolist()


def context(tokens: list[int]) -> Context:
    return Context(tokens, 1, Sampling(), torch.Generator())


def rank_paths(size: int, candidates: int, depth: int) -> list[tuple[int, ...]]:
    """Return the path of ranks of every node of the static tree."""
    paths: list[tuple[int, ...]] = []
    for node in static_tree(size, candidates, depth):
        above = () if node.parent == ROOT else paths[node.parent]
        paths.append((*above, node.rank))
        assert node.depth == len(paths[-1])
    return paths


@pytest.mark.parametrize(("size", "candidates", "depth"), [(63, 8, 6), (1, 8, 6), (20, 3, 4), (30, 5, 2), (40, 2, 5)])
def test_static_tree_has_the_most_probable_nodes(size: int, candidates: int, depth: int) -> None:
    """By enumeration of all paths of ranks."""
    paths = rank_paths(size, candidates, depth)
    assert len(set(paths)) == len(paths) == min(size, sum(candidates**level for level in range(1, depth + 1)))
    every = itertools.chain(*(itertools.product(range(candidates), repeat=level) for level in range(1, depth + 1)))
    probable = sorted((math.prod(map(assumed_rate, path)) for path in every), reverse=True)
    found = [math.prod(map(assumed_rate, path)) for path in paths]
    assert found == pytest.approx(probable[:size])
    assert sum(map(assumed_rate, range(8))) == pytest.approx(0.96, abs=0.005)


def recycled(model: Transformer, prompt: list[int], length: int, size: int, k: int, depth: int) -> list[set[tuple]]:
    """Decode greedily by the paper's algorithm; return every step's draft as the set of its paths."""
    candidates: dict[int, list[int]] = {}
    for token, following in itertools.pairwise(prompt):
        known = candidates.setdefault(token, [])
        candidates[token] = [following, *(other for other in known if other != following)][:k]

    @torch.inference_mode()
    def logits(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor(tokens), outputs=slice(-1, None))[0]

    tokens = [*prompt, int(logits(prompt).argmax())]
    shape = rank_paths(size, k, depth)
    drafts = []
    while (room := length - (len(tokens) - len(prompt))) > 0:
        drafted: list[tuple[int, ...]] = []
        for ranks in shape:
            path: list[int] = []
            for rank in ranks:
                known = candidates.get([tokens[-1], *path][-1], [])
                path = [*path, known[rank]] if path is not None and rank < len(known) else None  # type: ignore
                if path is None:
                    break
            if path is not None and len(path) < room:
                drafted.append(tuple(path))
        drafts.append(set(drafted))
        likely = {path: logits([*tokens, *path]).topk(k).indices.tolist() for path in [(), *drafted]}
        right: tuple[int, ...] = ()
        while (longer := (*right, likely[right][0])) in likely:
            right = longer
        accepted = [right[:end] for end in range(len(right) + 1)]
        for path in [(), *drafted, *accepted]:
            candidates[[tokens[-1], *path][-1]] = likely[path]
        tokens = [*tokens, *right, likely[right][0]]
    return drafts


def paths_of(draft: Draft) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    assert len(set(paths)) == len(paths)
    return set(paths)


@pytest.mark.parametrize(("size", "candidates", "depth"), [(63, 8, 6), (20, 3, 4), (7, 1, 3)])
def test_every_draft_is_that_of_the_slow_algorithm(size: int, candidates: int, depth: int) -> None:
    accepted = 0
    for seed in range(4):
        model, prompt = model_of(seed), prompt_of(seed)
        drafts: list[set[tuple[int, ...]]] = []
        drafter = RecyclingDrafter(size, candidates, depth)
        limits = Limits(48, 2048, frozenset())
        found = decode(
            prompt,
            drafter,
            FP16Verifier(model, Setup(128)),
            Greedy(),
            Sampling(),
            limits,
            torch.Generator(),
            lambda step, drafts=drafts: drafts.append(paths_of(step.draft)),  # type: ignore[misc]
        )
        assert drafts == recycled(model, prompt, 48, size, candidates, depth)
        accepted += sum(found.accepted)
    assert accepted > 20


@pytest.mark.parametrize("num_tokens", ["auto", 63, 1])
@pytest.mark.parametrize("memory", ["prompt", "session"])
def test_greedy_output_is_that_of_autoregressive_decoding(num_tokens: int | str, memory: str) -> None:
    drafter = RecyclingDrafter(num_tokens, memory=memory)
    if num_tokens == "auto":
        drafter.use(PassCost([1, 64], [10], [[10.0, 30.0]]))
    accepted = 0
    for seed in (0, 1, 2, 3, 5):  # two tokens of seed 4's output are equally likely but for float32's rounding
        verifier, prompt, limits = (
            FP16Verifier(model_of(seed), Setup(128)),
            prompt_of(seed),
            Limits(60, 2048, frozenset()),
        )
        expected = decode(prompt, NoneDrafter(), verifier, Greedy(), Sampling(), limits, torch.Generator())
        found = decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())
        assert found.tokens == expected.tokens
        accepted += sum(found.accepted)
    assert accepted > 30


def test_greedy_chains_are_exact_in_bfloat16() -> None:
    """With one candidate per token the tree is a chain."""
    accepted = 0
    for seed in range(4):
        verifier, prompt = FP16Verifier(model_of(seed, torch.bfloat16), Setup(128)), prompt_of(seed)
        limits = Limits(60, 2048, frozenset())
        expected = decode(prompt, NoneDrafter(), verifier, Greedy(), Sampling(), limits, torch.Generator())
        drafter = RecyclingDrafter(4, candidates=1)
        found = decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())
        assert found.tokens == expected.tokens
        accepted += sum(found.accepted)
    assert accepted > 10


def test_sampling_works_on_the_trees() -> None:
    sampling = Sampling(1.0)
    verifier, limits = FP16Verifier(model_of(0), Setup(128)), Limits(40, 2048, frozenset())
    rule, generator = RejectionSampling(sampling), torch.Generator().manual_seed(0)
    found = decode(prompt_of(0), RecyclingDrafter(), verifier, rule, sampling, limits, generator)
    assert len(found.tokens) == 40


def test_the_matrix_keeps_the_latest_text_first_and_takes_four_bytes_per_candidate() -> None:
    matrix = AdjacencyMatrix(3)
    matrix.add_text([1, 2, 1, 3, 1, 2, 1, 4, 1, 5])
    assert matrix.row(1) == [5, 4, 2]
    assert matrix.row(2) == [1, -1, -1]
    assert matrix.row(99) == [-1, -1, -1]
    matrix.replace(49151, [7])
    assert matrix.row(49151) == [7, -1, -1]
    assert matrix.row(1) == [5, 4, 2]
    matrix.clear()
    assert matrix.row(1) == [-1, -1, -1]
    large = AdjacencyMatrix(8)
    large.replace(49151, [1])
    assert large._rows.nbytes == 49152 * 8 * 4 < 2e6


def step_of(drafter: RecyclingDrafter, tokens: list[int], favourites: dict[int, list[int]]) -> Draft:
    """Draft once and let the verifier prefer ``favourites`` after each token, in this order."""
    draft = drafter.propose(context(tokens), 5)
    logits = torch.zeros(len(draft) + 1, VOCABULARY)
    for row, token in enumerate([tokens[-1], *draft.tokens]):
        for rank, favourite in enumerate(favourites.get(token, [])):
            logits[row, favourite] = 10.0 - rank
    drafter.observe(StepResult(draft, [favourites[tokens[-1]][0]], [], logits, None))
    return draft


def test_rejected_tokens_are_recycled() -> None:
    """The example of the docstring: 1 the, 2 cat, 3 dog, 4 sat, 5 is, 6 ran."""
    drafter = RecyclingDrafter(3, candidates=2)
    drafter.begin(torch.tensor([9]))
    step_of(drafter, [9, 1], {1: [2, 3]})
    step_of(drafter, [9, 2], {2: [4, 5]})
    draft = step_of(drafter, [9, 1], {1: [2, 3], 2: [6, 5], 3: [7, 8], 4: [1, 2]})
    assert paths_of(draft) == {(2,), (3,), (2, 4)}
    assert paths_of(drafter.propose(context([9, 3]), 5)) >= {(7,), (8,)}
    assert paths_of(drafter.propose(context([9, 2]), 1)) == {(6,), (5,)}


def test_memory_of_the_session() -> None:
    for memory, kept in (("prompt", False), ("session", True)):
        drafter = RecyclingDrafter(5, memory=memory)
        drafter.begin(torch.tensor([9]))
        step_of(drafter, [9, 1], {1: [2, 3]})
        drafter.begin(torch.tensor([8]))
        assert bool(len(drafter.propose(context([8, 1]), 5))) == kept
        # A continued run knows the tokens of the earlier sequences, and nothing of the warm-up.
        drafter.start([FinishedSequence([5, 6], [7])])
        drafter.begin(torch.tensor([8]))
        assert not len(drafter.propose(context([8, 1]), 5))
        assert (drafter.propose(context([8, 6]), 5).tokens[:1] == [7]) == kept


def test_an_automatic_tree_is_as_fast_as_autoregressive_decoding_where_it_is_wrong() -> None:
    """Rows cost 6.5 % of a pass, and the next token is drawn from 48 at random."""
    cost = PassCost([1, 64], [10], [[10.0, 10.0 + 0.65 * 63]])
    generator, drafter = random.Random(0), RecyclingDrafter()
    drafter.use(cost)
    drafter.begin(torch.tensor([1]))
    tokens, milliseconds, emitted = [1, 2], 0.0, 0
    for _ in range(1200):
        draft = drafter.propose(context(tokens), 20)
        milliseconds += float(cost(np.array([draft.rows]), 0)[0])
        logits = torch.rand(len(draft) + 1, VOCABULARY)
        truth = generator.randrange(VOCABULARY)
        path = [node for node in draft.children(ROOT) if draft.tokens[node] == truth]
        step = [truth] if not path else [truth, generator.randrange(VOCABULARY)]
        drafter.observe(StepResult(draft, step, path, logits, None))
        tokens, emitted = tokens + step, emitted + len(step)
    assert emitted / milliseconds * 10.0 >= 0.97


@pytest.mark.parametrize("options", [{"num_tokens": 64}, {"num_tokens": 0}, {"candidates": 64}, {"depth": 0}])
def test_values_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError, match=r"(less|greater) than"):
        RecyclingDrafter(**options)
