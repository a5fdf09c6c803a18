"""Block verification against the enumeration of all drafts and outcomes in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

from quasar.decoding.acceptance import Accepted, RejectionSampling
from quasar.decoding.block_verification import BlockVerification, decide
from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores

Model = dict[tuple[int, ...], Tensor]
"""Distribution [V], in float64, of the token after every sequence of at most T tokens."""


def random_model(vocabulary: int, length: int, seed: int, zeros: bool = False) -> Model:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for size in range(length + 1):
        for tokens in itertools.product(range(vocabulary), repeat=size):
            weights = torch.rand(vocabulary, generator=generator, dtype=torch.float64) ** 3
            if zeros and size % 2:
                weights[int(torch.randint(vocabulary, (1,), generator=generator))] = 0.0
            found[tokens] = weights / weights.sum()
    return found


def rows(model: Model, tokens: tuple[int, ...], count: int) -> Tensor:
    return torch.stack([model[tokens[:index]] for index in range(count)])


def probability(model: Model, tokens: tuple[int, ...]) -> float:
    """Of a sequence, token by token."""
    found = 1.0
    for index, token in enumerate(tokens):
        found *= float(model[tokens[:index]][token])
    return found


def outcomes(target: Model, proposal: Model, draft: tuple[int, ...]) -> list[tuple[float, Tensor]]:
    """For every accepted length: its probability, and the distribution of the bonus token."""
    size = len(draft)
    block = decide(rows(target, draft, size + 1), rows(proposal, draft, size), torch.tensor(draft))
    found, none_longer = [], 1.0
    for length in range(size, -1, -1):
        stop = float(block.stop[length - 1]) if length else 1.0
        found.append((none_longer * stop, block.residual[length] / block.residual[length].sum()))
        none_longer *= 1 - stop
    return found[::-1]


MODELS = [(2, 3, 0, False), (3, 3, 1, False), (3, 2, 2, True), (4, 2, 3, False), (5, 1, 4, True), (2, 4, 5, False)]


@pytest.mark.parametrize(("vocabulary", "size", "seed", "zeros"), MODELS)
def test_the_output_has_the_verifiers_distribution(vocabulary: int, size: int, seed: int, zeros: bool) -> None:
    """Over all drafts and accepted lengths; behind the bonus token the sequence goes on as the verifier does."""
    target = random_model(vocabulary, size, seed, zeros)
    proposal = random_model(vocabulary, size, seed + 100, zeros)
    found = dict.fromkeys(itertools.product(range(vocabulary), repeat=size + 1), 0.0)
    for draft in itertools.product(range(vocabulary), repeat=size):
        drawn = probability(proposal, draft)
        if not drawn:
            continue
        for length, (chance, bonus) in enumerate(outcomes(target, proposal, draft)):
            for token, rest in itertools.product(
                range(vocabulary), itertools.product(range(vocabulary), repeat=size - length)
            ):
                text = (*draft[:length], token, *rest)
                if not chance:
                    continue
                after = probability(target, text) / (probability(target, text[: length + 1]) or 1.0)
                found[text] += drawn * chance * float(bonus[token]) * after
    for text, chance in found.items():
        assert abs(chance - probability(target, text)) < 1e-12, text


def expected_lengths(target: Model, proposal: Model, vocabulary: int, size: int) -> tuple[float, float]:
    """The expected number of accepted tokens, of block verification and token by token."""
    block = tokens = 0.0
    for draft in itertools.product(range(vocabulary), repeat=size):
        drawn = probability(proposal, draft)
        if not drawn:
            continue
        block += drawn * sum(length * chance for length, (chance, _) in enumerate(outcomes(target, proposal, draft)))
        reached = 1.0
        for index, token in enumerate(draft):
            reached *= min(1.0, float(target[draft[:index]][token] / proposal[draft[:index]][token]))
            tokens += drawn * reached
    return block, tokens


@pytest.mark.parametrize(("vocabulary", "size", "seed", "zeros"), MODELS)
def test_at_least_as_many_tokens_are_accepted_as_token_by_token(
    vocabulary: int, size: int, seed: int, zeros: bool
) -> None:
    target = random_model(vocabulary, size, seed, zeros)
    block, tokens = expected_lengths(target, random_model(vocabulary, size, seed + 100, zeros), vocabulary, size)
    if size == 1:
        assert block == pytest.approx(tokens, abs=1e-12)  # both accept with min(1, p / q)
    else:
        assert block > tokens + 1e-3


def test_the_example_of_the_paper() -> None:
    """The motivating example of Sun et al. 2024: token by token 10/9 of two tokens are accepted, as a block 11/9."""
    p, q = (torch.tensor(found, dtype=torch.float64) / 3 for found in ([1.0, 2.0], [2.0, 1.0]))
    sequences = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    found = expected_lengths(dict.fromkeys(sequences, p), dict.fromkeys(sequences, q), 2, 2)
    assert found == (pytest.approx(11 / 9), pytest.approx(10 / 9))


def test_equal_distributions_accept_everything() -> None:
    model = random_model(3, 2, 9)
    for draft in itertools.product(range(3), repeat=2):
        chances = [chance for chance, _ in outcomes(model, model, draft)]
        assert chances == pytest.approx([0.0, 0.0, 1.0])


def test_the_rule_draws_what_was_decided() -> None:
    """Frequencies of accepted length and bonus token, for one draft."""
    sampling, generator = Sampling(1.0), torch.Generator().manual_seed(0)
    target, proposal = random_model(3, 3, 1), random_model(3, 3, 101)
    draft = (1, 0, 1)  # h = 0.61, 0.00, 0.82: often the last token is accepted although an earlier length was not drawn
    chain = Draft.chain(list(draft), rows(proposal, draft, 3).float())
    scores = Scores(rows(target, draft, 4).log().float())
    expected = {
        (length, token): chance * float(bonus[token])
        for length, (chance, bonus) in enumerate(outcomes(target, proposal, draft))
        for token in range(3)
    }
    counts = dict.fromkeys(expected, 0)
    for _ in range(2_000):
        accepted = BlockVerification(sampling).accept(chain, scores, Context([0], 1, sampling, generator))
        assert accepted.path == list(range(len(accepted.path)))
        counts[len(accepted.path), accepted.bonus] += 1
    possible = [key for key, chance in expected.items() if chance > 2e-3]
    assert sum(counts[key] for key in expected if key not in possible) <= 40
    found, wanted = ([each[key] for key in possible] for each in (counts, expected))
    scale = sum(found) / sum(wanted)
    assert stats.chisquare(found, [scale * chance for chance in wanted]).pvalue > 1e-4


@pytest.mark.parametrize(
    "draft",
    [Draft(), Draft.chain([1, 2]), Draft([1, 2], [ROOT, ROOT], torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.0, 0.6]]))],
)
def test_trees_and_drafts_without_distributions_are_left_to_the_token_rule(draft: Draft) -> None:
    sampling = Sampling(1.0)
    scores = Scores(torch.randn(len(draft) + 1, 3, generator=torch.Generator().manual_seed(3)))

    def accepted(rule: RejectionSampling | BlockVerification) -> list[Accepted]:
        context = Context([0], 1, sampling, torch.Generator().manual_seed(1))
        return [rule.accept(draft, scores, context) for _ in range(40)]

    assert accepted(BlockVerification(sampling)) == accepted(RejectionSampling(sampling))
