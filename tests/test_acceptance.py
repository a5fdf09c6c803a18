"""Acceptance: greedy follows the argmax; sampling follows the verifier's distribution.

Each statistical test is seeded, so it is deterministic; under a fresh seed it would raise a false alarm with a
chance of ALPHA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from quasar.decoding.acceptance import Accepted, Greedy, RejectionSampling, Typical
from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.sampling import Sampling, draw, draw_on_device, most_likely
from quasar.decoding.scores import Scores
from tests.selection import always, fast

SAMPLINGS = [
    Sampling(temperature, top_k, top_p)
    for temperature in (0.7, 1.0)
    for top_k, top_p in ((None, 1.0), (4, 1.0), (None, 0.8), (5, 0.9))
]
Accept = Callable[[RejectionSampling, Draft, Scores, Context], Accepted]
GREEDY = Sampling()
VOCABULARY = 6
DRAWS = 6_000
ALPHA = 1e-4
FEWEST = 5.0
"""Smallest expected count of a cell in a chi-square test, which its approximation requires."""


def after(generator: torch.Generator, length: int = 1, sampling: Sampling = GREEDY) -> Context:
    """A context of this many tokens."""
    return Context([0] * length, 1, sampling, generator)


def one_hot_logits(tokens: list[int]) -> torch.Tensor:
    logits = torch.zeros(len(tokens), 10)
    logits[range(len(tokens)), tokens] = 1.0
    return logits


@pytest.mark.parametrize(
    ("draft", "targets", "path", "bonus"),
    [
        (Draft(), [7], [], 7),
        (Draft.chain([1, 2, 3]), [1, 2, 3, 4], [0, 1, 2], 4),
        (Draft.chain([1, 2, 3]), [1, 5, 3, 4], [0], 5),
        (Draft.chain([1, 2, 3]), [2, 2, 3, 4], [], 2),
        (Draft([1, 2, 3, 4], [ROOT, ROOT, 1, 1]), [2, 9, 4, 9, 6], [1, 3], 6),
        (Draft([1, 2], [ROOT, 0]), [5, 2, 3], [], 5),  # a child that would match counts for nothing without its parent
    ],
)
def test_greedy(draft: Draft, targets: list[int], path: list[int], bonus: int) -> None:
    accepted = Greedy().accept(draft, Scores(one_hot_logits(targets)), after(torch.Generator()))
    assert (accepted.path, accepted.bonus) == (path, bonus)


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 1.5


def assert_follows(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected, order = probabilities[possible].double().sort()
    expected *= counts.sum() / expected.sum()
    found = counts[possible].double()[order]
    # The rarest cells are merged into one.
    rare = int((expected.cumsum(0) < FEWEST).sum()) + 1 if expected[0] < FEWEST else 1
    found, expected = (torch.cat([cells[:rare].sum().view(1), cells[rare:]]) for cells in (found, expected))
    assert stats.chisquare(found.numpy(), expected.numpy()).pvalue > ALPHA


def first_token(draft: Draft, path: list[int], bonus: int) -> int:
    return draft.tokens[path[0]] if path else bonus


@pytest.mark.parametrize("sampling", always(SAMPLINGS, Sampling(0.7), Sampling(1.0, 5, 0.9)), ids=str)
@pytest.mark.parametrize("token", fast([0, 3], 3))
@pytest.mark.parametrize("accept", [RejectionSampling.accept, RejectionSampling.accept_chain])
def test_one_hot_draft_keeps_the_distribution(accept: Accept, sampling: Sampling, token: int) -> None:
    rule, generator = RejectionSampling(sampling), torch.Generator().manual_seed(token)
    logits = random_logits(2, seed=7)
    draft = Draft.chain([token])
    first, second = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    for _ in range(DRAWS):
        accepted = accept(rule, draft, Scores(logits), after(generator))
        first[first_token(draft, accepted.path, accepted.bonus)] += 1
        if accepted.path:
            second[accepted.bonus] += 1
    assert_follows(first, sampling.probabilities(logits[0]))
    if second.sum() > 100:
        assert_follows(second, sampling.probabilities(logits[1]))


@pytest.mark.parametrize("sampling", always(SAMPLINGS, Sampling(0.7), Sampling(1.0, 5, 0.9)), ids=str)
@pytest.mark.parametrize("accept", [RejectionSampling.accept, RejectionSampling.accept_chain])
def test_drawn_draft_keeps_the_distribution(accept: Accept, sampling: Sampling) -> None:
    """The draft tokens have their own distribution, but the joint distribution of two tokens is the verifier's."""
    rule, generator = RejectionSampling(sampling), torch.Generator().manual_seed(1)
    root, following = random_logits(1, seed=2)[0], random_logits(VOCABULARY, seed=3)
    proposals = random_logits(1 + VOCABULARY, seed=4).softmax(-1)
    joint = torch.zeros(VOCABULARY, VOCABULARY)
    for _ in range(DRAWS):
        first = draw(proposals[0], generator)
        second = draw(proposals[1 + first], generator)
        draft = Draft.chain([first, second], torch.stack([proposals[0], proposals[1 + first]]))
        logits = torch.stack([root, following[first], root])
        accepted = accept(rule, draft, Scores(logits), after(generator))
        emitted = [draft.tokens[node] for node in accepted.path] + [accepted.bonus]
        if len(emitted) == 1:
            # The sequence continues with the verifier's own distribution after the replacement.
            emitted.append(draw(sampling.probabilities(following[emitted[0]]), generator))
        joint[emitted[0], emitted[1]] += 1
    conditional = torch.stack([sampling.probabilities(row) for row in following])
    expected = sampling.probabilities(root).unsqueeze(1) * conditional
    assert_follows(joint.flatten(), expected.flatten())


@pytest.mark.parametrize("sampling", always(SAMPLINGS, Sampling(0.7), Sampling(1.0, 5, 0.9)), ids=str)
def test_tree_of_siblings_keeps_the_distribution(sampling: Sampling) -> None:
    """There are two deterministic siblings. The likelier one is tried second and has a child."""
    rule, generator = RejectionSampling(sampling), torch.Generator().manual_seed(5)
    logits = random_logits(4, seed=6)
    second, likeliest = logits[0].topk(2).indices.flip(0).tolist()
    draft = Draft([second, likeliest, 1], [ROOT, ROOT, 1])
    first, below = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    for _ in range(DRAWS):
        accepted = rule.accept(draft, Scores(logits), after(generator))
        first[first_token(draft, accepted.path, accepted.bonus)] += 1
        if accepted.path[:1] == [1]:
            below[1 if len(accepted.path) == 2 else accepted.bonus] += 1
    assert_follows(first, sampling.probabilities(logits[0]))
    assert below.sum() > 100
    assert_follows(below, sampling.probabilities(logits[2]))


@pytest.mark.parametrize("sampling", always(SAMPLINGS, Sampling(0.7), Sampling(1.0, 5, 0.9)), ids=str)
def test_siblings_drawn_without_replacement_keep_the_distribution(sampling: Sampling) -> None:
    """In recursive rejection, the second sibling's distribution is the first one's without the first token."""
    rule, generator = RejectionSampling(sampling), torch.Generator().manual_seed(8)
    logits, proposal = random_logits(3, seed=9), random_logits(1, seed=10)[0].softmax(-1)
    counts = torch.zeros(VOCABULARY)
    for _ in range(DRAWS):
        tokens, distributions = zip(*drawn_without_replacement(proposal, generator), strict=True)
        draft = Draft(list(tokens), [ROOT, ROOT], torch.stack(distributions))
        accepted = rule.accept(draft, Scores(logits), after(generator))
        counts[first_token(draft, accepted.path, accepted.bonus)] += 1
    assert_follows(counts, sampling.probabilities(logits[0]))


def drawn_without_replacement(proposal: torch.Tensor, generator: torch.Generator) -> list[tuple[int, torch.Tensor]]:
    """There are two tokens, each with the distribution that it was drawn from."""
    first = draw(proposal, generator)
    rest = proposal.clone()
    rest[first] = 0
    rest /= rest.sum()
    return [(first, proposal), (draw(rest, generator), rest)]


@pytest.mark.parametrize("sampling", always(SAMPLINGS, Sampling(0.7), Sampling(1.0, 5, 0.9)), ids=str)
def test_tree_drawn_without_replacement_keeps_the_distribution(sampling: Sampling) -> None:
    """With two levels of two siblings each, the joint distribution of two tokens is the verifier's."""
    rule, generator = RejectionSampling(sampling), torch.Generator().manual_seed(15)
    root, following = random_logits(1, seed=16)[0], random_logits(VOCABULARY, seed=17)
    proposals = random_logits(1 + VOCABULARY, seed=18).softmax(-1)
    joint = torch.zeros(VOCABULARY, VOCABULARY)
    for _ in range(DRAWS):
        nodes = drawn_without_replacement(proposals[0], generator)
        nodes += [child for token, _ in nodes for child in drawn_without_replacement(proposals[1 + token], generator)]
        tokens, distributions = zip(*nodes, strict=True)
        draft = Draft(list(tokens), [ROOT, ROOT, 0, 0, 1, 1], torch.stack(distributions))
        accepted = rule.accept(draft, Scores(torch.cat([root.unsqueeze(0), following[list(tokens)]])), after(generator))
        emitted = [tokens[node] for node in accepted.path] + [accepted.bonus]
        if len(emitted) == 1:
            emitted.append(draw(sampling.probabilities(following[emitted[0]]), generator))
        joint[emitted[0], emitted[1]] += 1
    conditional = torch.stack([sampling.probabilities(row) for row in following])
    assert_follows(joint.flatten(), (sampling.probabilities(root).unsqueeze(1) * conditional).flatten())


def test_acceptance_probability_is_the_overlap_of_the_distributions() -> None:
    """Leviathan et al. 2023, theorem 3.5: a token drawn from q is accepted with probability sum(min(p, q))."""
    sampling, generator = Sampling(1.0), torch.Generator().manual_seed(11)
    logits, proposal = random_logits(2, seed=12), random_logits(1, seed=13)[0].softmax(-1)
    rule = RejectionSampling(sampling)
    hits = 0
    for _ in range(DRAWS):
        draft = Draft.chain([draw(proposal, generator)], proposal.unsqueeze(0))
        hits += len(rule.accept(draft, Scores(logits), after(generator)).path)
    overlap = float(torch.minimum(sampling.probabilities(logits[0]), proposal).sum())
    assert stats.binomtest(hits, DRAWS, overlap).pvalue > ALPHA


def test_typical_keeps_the_longest_path_of_likely_tokens() -> None:
    """A flat distribution over four tokens has entropy log 4, so that 0.3 / 4 = 0.075 is enough there."""
    flat = [0.25, 0.25, 0.25, 0.25]
    sharp = [0.85, 0.08, 0.06, 0.01]  # exp(-H) = 0.567: the bound is the threshold, 0.09
    rule, generator = Typical(Sampling(1.0), threshold=0.09, alpha=0.3), torch.Generator().manual_seed(0)

    def accepted(draft: Draft, *rows: list[float]) -> list[int]:
        return rule.accept(draft, Scores(torch.tensor(rows).log()), after(generator)).path

    assert accepted(Draft.chain([1, 0, 3]), flat, sharp, flat, sharp) == [0, 1, 2]
    assert accepted(Draft.chain([1, 1, 3]), flat, sharp, flat, sharp) == [0]  # 0.08 after the first token
    assert accepted(Draft.chain([3, 0]), sharp, flat, flat) == []
    # The deeper of two branches is kept, and the first of equal ones, however likely the others are.
    assert accepted(Draft([0, 2, 3], [ROOT, ROOT, 1]), flat, sharp, sharp, flat) == [0]
    assert accepted(Draft([0, 2, 0], [ROOT, ROOT, 1]), flat, sharp, sharp, flat) == [1, 2]
    # A kept token below a rejected one does not count.
    assert accepted(Draft([3, 0], [ROOT, 0]), sharp, sharp, sharp) == []


def test_typical_bound_falls_with_entropy_and_the_bonus_is_typical_too() -> None:
    rule, generator = Typical(Sampling(1.0), threshold=0.3, alpha=0.5), torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    bound = 0.5 * math.exp(float((probabilities * probabilities.log()).sum()))
    assert 0.06 < bound < 0.2
    bonuses = [
        rule.accept(Draft(), Scores(probabilities.log().unsqueeze(0)), after(generator)).bonus for _ in range(DRAWS)
    ]
    counts = torch.bincount(torch.tensor(bonuses), minlength=5)
    # The bonus token has the verifier's proportions among the three typical tokens.
    assert_follows(counts, torch.tensor([0.4, 0.3, 0.2, 0.0, 0.0]))


def test_typical_is_lossy() -> None:
    """The rule is lossy: a draft that is always the second best token is always kept."""
    rule, generator = Typical(Sampling(1.0), threshold=0.09, alpha=0.3), torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert all(rule.accept(Draft.chain([1]), Scores(logits), after(generator)).path == [0] for _ in range(50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_most_likely_is_the_first_of_equals(dtype: torch.dtype) -> None:
    """There are many ties, and rows are longer than any vector or block of a reduction."""
    logits = torch.randint(0, 4, (9, 49_157), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert most_likely(logits) == expected


def test_a_chain_on_a_gpu_is_accepted_like_any_other() -> None:
    """The cases without randomness take the code path that only a GPU takes."""
    rule, generator = RejectionSampling(Sampling(1.0, top_k=1)), torch.Generator()
    for tokens, targets, count in (([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 5, 3, 4], 1), ([], [7], 0)):
        draft, logits = Draft.chain(tokens), one_hot_logits(targets)
        expected = Accepted(list(range(count)), targets[count])
        assert (
            rule.accept_chain(draft, Scores(logits), after(generator))
            == rule.accept(draft, Scores(logits), after(generator))
            == expected
        )


def test_drawing_on_the_device_draws_the_same() -> None:
    probabilities = torch.rand(300, generator=torch.Generator().manual_seed(3))
    probabilities[::3] = 0.0
    first, second = (torch.Generator().manual_seed(4) for _ in range(2))
    drawn = [draw(probabilities, first) for _ in range(200)]
    assert [draw_on_device(probabilities, second).item() for _ in range(200)] == drawn
    assert len(set(drawn)) > 50


class NothingWaits(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("multinomial", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        assert func.overloadpacket.__name__ not in waiting, func
        return func(*args, **(kwargs or {}))


def test_a_chain_on_a_gpu_is_accepted_with_one_wait() -> None:
    """The one is ``tolist``, which no operation stands for."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    proposals = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).softmax(-1)
    for sampling in (Sampling(1.0), Sampling(0.7, top_k=9, top_p=0.9)):
        for draft in (Draft.chain([1, 2, 3]), Draft.chain([1, 2, 3], proposals)):
            with NothingWaits():
                RejectionSampling(sampling).accept_chain(draft, Scores(logits), after(torch.Generator()))


def test_what_a_pass_found_decides_a_greedy_step() -> None:
    logits, generator = one_hot_logits([1, 2, 3]), torch.Generator()
    draft = Draft.chain([5, 9])
    found = Scores(logits, found=lambda: [5, 6, 7])
    assert Greedy().accept(draft, found, after(generator)) == Accepted([0], 6)
    assert Greedy().accept(draft, Scores(logits), after(generator)) == Accepted([], 1)
    assert Greedy().accept(draft, Scores(logits, found=lambda: None), after(generator)) == Accepted([], 1)
    assert RejectionSampling(Sampling(1.0, top_k=1)).accept(draft, found, after(generator)) == Accepted([], 1)


def test_sampling_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert Sampling(0.0).probabilities(logits).tolist() == [1, 0, 0, 0]
    assert torch.allclose(Sampling(2.0).probabilities(logits), (logits / 2).softmax(-1))
    top2 = Sampling(1.0, top_k=2).probabilities(logits)
    assert torch.allclose(top2, torch.tensor([0.7311, 0.2689, 0.0, 0.0]), atol=1e-4)
    # Masses are 0.644, 0.237, 0.087, 0.032: 0.8 needs the first two, 0.6 the first alone.
    assert (Sampling(1.0, top_p=0.8).probabilities(logits) > 0).tolist() == [True, True, False, False]
    assert Sampling(1.0, top_p=0.6).probabilities(logits).tolist() == [1, 0, 0, 0]
