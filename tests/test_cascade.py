"""Cascades: a block is what the inner verifier would decode, and the output is the outer verifier's own.

Each statistical test is seeded, so it is deterministic; under a fresh seed it would raise a false alarm with a chance
of ALPHA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from scipy import stats

from quasar.config.build import build
from quasar.decoding.acceptance import Accepted, RejectionSampling, Typical, rule_for
from quasar.decoding.draft import MAX_ROWS, Context, Draft, StepResult
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling, draw
from quasar.decoding.scores import Scores
from quasar.decoding.stopping import Limits
from quasar.drafters._adaptive_length import AdaptiveLength
from quasar.drafters._inner_level import InnerLevel
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import Drafter
from quasar.drafters.cascade import CascadeDrafter
from quasar.drafters.layerskip import LayerSkipDrafter
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.drafters.model import ModelDrafter
from quasar.drafters.ngram import NgramDrafter
from quasar.drafters.none import NoneDrafter
from quasar.drafters.suffix_automaton import SuffixAutomatonDrafter
from quasar.errors import RequestError
from quasar.model.loading import random_transformer, tiny_config
from quasar.testing import check_drafter
from quasar.verifiers.base import LayeredVerifier, Setup, Verifier, VerifierCost
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from quasar.verifiers.pruned import PrunedVerifier
from tests.compose import composed_run, resources_for
from tests.selection import always

GREEDY = Sampling()
COSTS = (PassCost([1, 32], [100], [[8.0, 12.0]]), PassCost([1, 32], [100], [[3.0, 9.0]]))
ALPHA = 1e-4
DRAWS = 1200
VOCABULARY = 3


def fp16(dtype: torch.dtype = torch.float32) -> FP16Verifier:
    return FP16Verifier(random_transformer(tiny_config(vocab_size=64), 0, dtype), Setup(capacity=32))


def int8(dtype: torch.dtype = torch.float32) -> Int8Verifier:
    return Int8Verifier(random_transformer(tiny_config(vocab_size=64), 0, dtype), Setup(capacity=32), method="rtn")


def int4(dtype: torch.dtype = torch.float32) -> Int4Verifier:
    return Int4Verifier(random_transformer(tiny_config(vocab_size=64), 0, dtype), Setup(capacity=32), method="rtn")


def shallow(dtype: torch.dtype = torch.float32) -> PrunedVerifier:
    model = random_transformer(tiny_config(vocab_size=64), 0, dtype)
    return PrunedVerifier(model, Setup(capacity=32), method="depth", layers=[2])


def cascade(inner: LayeredVerifier, drafter: Drafter | None = None, block: int | str = 4) -> CascadeDrafter:
    """Return a cascade with this inner verifier and drafter, which must be ready for it."""
    made = CascadeDrafter("fp16", "none", block)  # type: ignore[arg-type]
    made.drafter = drafter or NgramDrafter()
    if isinstance(made.drafter, LayerSkipDrafter):
        made.drafter.use(inner)
    # Time stands still, so that every run chooses the same blocks.
    made.use(inner, COSTS if block == "auto" else None, clock=lambda: 0.0)
    return made


def draft_model(verifier: LayeredVerifier) -> ModelDrafter:
    drafter = ModelDrafter({}, num_tokens=3)
    drafter.use(verifier)
    return drafter


def inner_drafters(dtype: torch.dtype = torch.float32) -> dict[str, Drafter]:
    return {
        "none": NoneDrafter(),
        "ngram": NgramDrafter(),
        "tree": NgramDrafter(match="frequent", branches=3),
        "automaton": SuffixAutomatonDrafter(num_tokens=8, match="recent", scope="session"),
        "lookahead": LookaheadDrafter(window=3, ngram=3),
        "layerskip": LayerSkipDrafter(num_tokens=3),
        "model": draft_model(shallow(dtype)),
        "cascade": cascade(int4(dtype), NgramDrafter(), block=3),
    }


def generate(
    drafter: Drafter, verifier: Verifier, prompt: list[int], length: int, sampling: Sampling = GREEDY, seed: int = 0
) -> Generation:
    limits = Limits(length, 2048, frozenset())
    return decode(prompt, drafter, verifier, rule_for(sampling), sampling, limits, torch.Generator().manual_seed(seed))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", always([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("name", list(inner_drafters()))
def test_greedy_output_is_the_outer_verifiers_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    outer = fp16(dtype)
    accepted = 0
    blocks: tuple[tuple[LayeredVerifier, int | str], ...] = ((int8(dtype), 4), (int4(dtype), "auto"))
    for inner, block in blocks:
        drafter = cascade(inner, inner_drafters(dtype)[name], block)
        for prompt in prompts(3):
            expected = generate(NoneDrafter(), outer, prompt, 50)
            found = generate(drafter, outer, prompt, 50)
            assert found.tokens == expected.tokens
            accepted += sum(found.accepted)
    assert accepted > 60


@pytest.mark.parametrize("name", list(inner_drafters()))
@pytest.mark.parametrize("block", always([1, 5], 5))
def test_a_block_is_what_the_inner_verifier_decodes_alone(name: str, block: int) -> None:
    """After any acceptance, and between steps in which it took no part: its cache contains what stands."""
    fresh, drafter = int8(), cascade(int8(), inner_drafters()[name], block)
    choose = torch.Generator().manual_seed(3)
    context = Context([1, 2, 3, 4], 3, GREEDY, torch.Generator())
    drafter.begin(torch.tensor([1, 2, 3]))
    for direct in (0, 0, 0, 1, 0, 1, 1, 0, 0):
        drafter.block = "auto" if direct else block
        drafter._choice = Never() if direct else None  # type: ignore[assignment]
        draft = drafter.propose(context, 12)
        if not direct:
            assert block <= len(draft) <= 12
            expected = generate(NoneDrafter(), fresh, context.tokens, len(draft)).tokens
            assert draft.tokens == expected
            assert draft.parents == list(range(-1, len(draft) - 1))
        right = 0 if not draft.is_chain else int(torch.randint(0, len(draft) + 1, (), generator=choose))
        emitted = [*draft.tokens[:right], int(torch.randint(0, 64, (), generator=choose))]
        context.tokens += emitted
        logits = torch.zeros(len(draft) + 1, 64)
        scratch = None if draft.scratch is None else torch.zeros(len(draft.scratch.outputs), 64)
        drafter.observe(StepResult(draft, emitted, list(range(right)), logits, scratch))


class Never:
    """Chooses direct steps."""

    def choose(self, longest: int, start: Any) -> int:
        return 0

    def add_direct(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("name", ["ngram", "automaton", "model"])
def test_the_inner_drafter_knows_only_what_stands(name: str) -> None:
    """After every step it drafts what a drafter does that has never seen another token."""
    drafter = cascade(int8(), inner_drafters()[name], 6)
    context = Context([1, 2, 1, 2, 1, 2], 3, GREEDY, torch.Generator())
    drafter.begin(torch.tensor([1, 2, 1]))
    for right in (0, 3, 1, 6, 2, 0, 5):
        draft = drafter.propose(context, 6)
        assert len(draft) == 6
        emitted = [*draft.tokens[:right], 1 + right % 2]
        context.tokens += emitted
        drafter.observe(StepResult(draft, emitted, list(range(right)), torch.zeros(7, 64), None))
        fresh = inner_drafters()[name]
        fresh.begin(torch.tensor(context.tokens[:3]))
        probe = Context(list(context.tokens), 3, GREEDY, torch.Generator())
        found, expected = drafter.drafter.propose(probe, 5), fresh.propose(probe, 5)
        assert (found.tokens, found.parents) == (expected.tokens, expected.parents)
        drafter.drafter.observe(StepResult(found, [9], [], torch.zeros(6, 64), None))
        drafter.drafter.rewind(len(context.tokens) - 1)


def test_unread_tokens_longer_than_a_pass_are_read_in_several() -> None:
    fresh, level = int8(), InnerLevel(int8(), NoneDrafter())
    level.begin(torch.tensor([1]))
    tokens = torch.randint(0, 64, (2 * MAX_ROWS + 7,), generator=torch.Generator().manual_seed(0)).tolist()
    context = Context([1, *tokens], 1, GREEDY, torch.Generator())
    assert level.unread(context) == len(tokens)
    draft = level.block(context, 3, 3)
    assert draft.tokens == generate(NoneDrafter(), fresh, context.tokens, 3).tokens
    assert level.passes == 3
    assert level.unread(Context(context.tokens + draft.tokens, 1, GREEDY, torch.Generator())) == 1


def test_scratch_rows_are_scored_behind_unread_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They attend to the first row of a pass, so an unread token before the last one is read by itself."""
    drafter = LookaheadDrafter(window=3, ngram=3)
    level, scored = InnerLevel(int8(), drafter), []
    monkeypatch.setattr(drafter, "observe", lambda step: scored.append(step.scratch_logits is not None))
    level.begin(torch.tensor([1, 2]))
    context = Context([1, 2, 3], 2, GREEDY, torch.Generator())
    for _ in range(3):
        context.tokens += [*level.block(context, 2, 9).tokens, 7]
        assert level.unread(context) == 2
    assert len(scored) >= 3
    assert all(scored)


class Table(LayeredVerifier):
    """A model whose logits after a token depend on the last two tokens. It checks that its cache is used correctly."""

    label = "table"
    cost = VerifierCost(1, 1)
    device = torch.device("cpu")
    dtype = torch.float32
    context_length = 100
    num_layers = 1

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator) * 1.5
        self._cache: list[int] = []
        self._pass: list[int] = []

    def prefill(self, tokens: torch.Tensor) -> Scores:
        self._cache = tokens.tolist()
        return Scores(self._after(self._cache).unsqueeze(0))

    def verify(self, last: int, draft: Draft) -> Scores:
        self._pass = [last, *draft.tokens]
        paths = {-1: [last]}
        for node, parent in enumerate(draft.parents):
            paths[node] = [*paths[parent], draft.tokens[node]]
        return Scores(torch.stack([self._after(self._cache + paths[node]) for node in range(-1, len(draft))]))

    def keep(self, path: Sequence[int]) -> None:
        self._cache += [self._pass[0], *(self._pass[node + 1] for node in path)]

    def rewind(self, length: int) -> None:
        del self._cache[length:]

    def teacher_forced(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        raise NotImplementedError

    def draft_logits(self, token: int, offset: int, layers: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError

    def share_cache(self, owner: LayeredVerifier) -> None:
        raise NotImplementedError

    def _after(self, tokens: list[int]) -> torch.Tensor:
        return self.table[tokens[-2], tokens[-1]]


class Drawn(Drafter):
    """Draws two tokens from a distribution of its own and says so."""

    def propose(self, context: Context, budget: int) -> Draft:
        if context.sampling.greedy:
            return Draft.chain([0] * min(2, budget))
        q = torch.tensor([0.6, 0.3, 0.1])
        tokens = [draw(q, context.generator) for _ in range(min(2, budget))]
        return Draft.chain(tokens, q.repeat(len(tokens), 1) if tokens else None)


SAMPLINGS = [Sampling(0.7), Sampling(1.0, top_k=2), Sampling(1.3, top_p=0.8)]
LEVELS = {
    "none": NoneDrafter,
    "drawn": Drawn,
    "ngram": lambda: NgramDrafter(num_tokens=3, n_max=1, branches=2),
    "cascade": lambda: cascade(Table(3), Drawn(), block=2),
}


def joint(tables: Table, sampling: Sampling, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every output of the model."""
    found = {}
    for output in product(range(VOCABULARY), repeat=length):
        tokens, probability = list(prompt), 1.0
        for token in output:
            probability *= float(sampling.probabilities(tables.table[tokens[-2], tokens[-1]])[token])
            tokens.append(token)
        found[output] = probability
    return found


def assert_follows(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> None:
    # Probabilities in float32 do not add up to 1 exactly.
    total = sum(counts.values()) / sum(expected.values())
    assert all(expected[output] > 0 for output in counts)
    cells = sorted((probability * total, counts[output]) for output, probability in expected.items() if probability)
    rare = [cell for cell in cells if cell[0] < 5.0]
    cells = [cell for cell in cells if cell[0] >= 5.0]
    if rare:
        cells.append((sum(cell[0] for cell in rare), sum(cell[1] for cell in rare)))
    assert len(cells) >= 5
    assert stats.chisquare([cell[1] for cell in cells], [cell[0] for cell in cells]).pvalue > ALPHA


@pytest.mark.parametrize("sampling", always(SAMPLINGS, Sampling(1.3, top_p=0.8)), ids=str)
@pytest.mark.parametrize("level", list(LEVELS))
def test_sampled_output_follows_the_outer_verifier(level: str, sampling: Sampling) -> None:
    """The joint distribution of four tokens behind the first, with blocks of two and three tokens."""
    outer = Table(1)
    counts: Counter[tuple[int, ...]] = Counter()
    drafter = cascade(Table(2), LEVELS[level](), block=2)
    generator = torch.Generator().manual_seed(7)
    rule, limits = rule_for(sampling), Limits(4, 100, frozenset())
    for _ in range(DRAWS):
        counts[tuple(decode([0, 1], drafter, outer, rule, sampling, limits, generator).tokens)] += 1
    assert_follows(counts, joint(outer, sampling, [0, 1], 4))


@pytest.mark.parametrize("sampling", always(SAMPLINGS, Sampling(1.3, top_p=0.8)), ids=str)
@pytest.mark.parametrize("level", list(LEVELS))
def test_a_sampled_block_names_the_distributions_that_it_follows(level: str, sampling: Sampling) -> None:
    inner = Table(2)
    drafter = cascade(inner, LEVELS[level](), block=3)
    generator = torch.Generator().manual_seed(8)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        drafter.begin(torch.tensor([0, 1]))
        context = Context([0, 1, 2], 2, sampling, generator)
        draft = drafter.propose(context, 5)
        assert draft.probabilities is not None
        tokens = [1, 2, *draft.tokens]
        for position in range(len(draft)):
            expected = sampling.probabilities(inner.table[tokens[position], tokens[position + 1]])
            assert draft.probabilities[position].tolist() == expected.tolist()
        counts[tuple(draft.tokens[:3])] += 1
        drafter.observe(StepResult(draft, [0], [], torch.zeros(1, 1), None))
    assert_follows(counts, joint(inner, sampling, [1, 2], 3))


def test_the_rule_hands_out_the_distributions_that_it_drew_from() -> None:
    sampling = Sampling(0.8, top_k=4)
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rule, expected = RejectionSampling(sampling), sampling.probabilities(logits)
    likely = expected.argmax(-1).tolist()
    for seed in range(20):
        for accept in (rule.accept, rule.accept_chain):
            context = Context([0], 1, sampling, torch.Generator().manual_seed(seed))
            found = accept(Draft.chain(likely[:3]), Scores(logits), context)
            assert len(found.targets) == len(found.path) + 1
            assert torch.equal(torch.stack(list(found.targets)), expected[: len(found.targets)])
    # They are not part of the decision.
    assert Accepted([0], 1, [logits[0]]) == Accepted([0], 1)


def test_coupled_output_is_that_of_autoregressive_sampling() -> None:
    sampling, outer = Sampling(0.9, coupled=True), Table(1)
    drafter, accepted = cascade(Table(2), NgramDrafter(), 4), 0
    for seed in range(30):
        expected = generate(NoneDrafter(), outer, [0, 1], 30, sampling, seed)
        found = generate(drafter, outer, [0, 1], 30, sampling, seed)
        assert found.tokens == expected.tokens
        accepted += sum(found.accepted)
    assert accepted > 200


def test_typical_acceptance_below_an_exact_inner_level() -> None:
    """A rule that accepts nearly everything emits blocks of the inner verifier, whatever the outer verifier thinks."""
    sampling, inner = Sampling(1.0), Table(2)
    drafter = cascade(inner, NgramDrafter(), block=2)
    rule, generator = Typical(sampling, threshold=1e-6, alpha=1e-6), torch.Generator().manual_seed(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        first, *others = decode(
            [0, 1], drafter, Table(1), rule, sampling, Limits(4, 100, frozenset()), generator
        ).tokens
        if first == 2:
            counts[tuple(others[:2])] += 1
    assert_follows(counts, joint(inner, sampling, [1, 2], 2))


def test_notes_and_details() -> None:
    outer = fp16()
    drafter = CascadeDrafter({"name": "int8", "method": "rtn"}, {"name": "ngram", "num_tokens": 3}, 4)  # type: ignore[arg-type]
    drafter.prepare(resources_for(outer, Setup(capacity=32)))
    found = generate(drafter, outer, [1, 2, 3, 1, 2], 40)
    notes = drafter.notes()
    assert notes["level"] == ["block" if drafted else "direct" for drafted in found.drafted]
    assert notes["block"] == found.drafted
    assert all(1 <= int(passes) <= 4 for passes in notes["inner_passes"][:-1])
    assert 1.0 <= float(notes["inner_acceptance_length"][-1]) <= 4.0
    assert 0.0 < float(notes["agreement"][-1]) <= 1.0
    # Embedding, head (tied in tiny_config or not) and norms are those of the outer verifier.
    assert "shares 0 MB" in drafter.details[0]
    assert "a KV cache of 0 MB" in drafter.details[0]


def test_the_agreement_is_that_of_the_blocks() -> None:
    """Blocks of four: one accepted, one rejected at its second token, one cut by the end of the output."""
    drafter = cascade(int8(), NoneDrafter(), 4)
    drafter.begin(torch.tensor([1]))
    before = drafter._agreement
    tried, kept = before.weight, before.value * before.weight
    context = Context([1, 2], 1, GREEDY, torch.Generator())
    for path, cut, decided in (([0, 1, 2, 3], False, 4), ([0], False, 2), ([0, 1], True, 2)):
        draft = drafter.propose(context, 9)
        context.tokens += [*(draft.tokens[node] for node in path), 7]
        drafter.observe(StepResult(draft, context.tokens[-len(path) - 1 :], path, torch.zeros(5, 64), None, cut))
        tried, kept = 0.99 * tried + decided, 0.99 * kept + len(path)
        assert drafter._agreement.value == pytest.approx(kept / tried)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_in_common_are_stored_once(dtype: torch.dtype) -> None:
    outer, inner, fewer = fp16(dtype), int8(dtype), shallow(dtype)
    tokens = torch.tensor([1, 2, 3, 4, 5])
    logits = [verifier.prefill(tokens).logits.clone() for verifier in (inner, fewer)]
    size = dtype.itemsize
    config = outer.model.config
    norms = (2 * config.num_layers + 1) * config.hidden_size * size
    tables = (1 if config.tie_word_embeddings else 2) * 64 * config.hidden_size * size
    assert inner.share_weights(outer) == tables + norms
    assert inner.model.lm_head is outer.model.lm_head
    assert inner.model.embedding is outer.model.embedding
    # All decoder blocks that a model without its third one still has are those of the outer verifier.
    saved = fewer.share_weights(outer)
    assert fewer.model.blocks[2].mlp.down is outer.model.blocks[3].mlp.down
    assert saved == fewer.cost.weight_bytes + (0 if config.tie_word_embeddings else 64 * config.hidden_size * size)
    for verifier, before in zip((inner, fewer), logits, strict=True):
        assert torch.equal(verifier.prefill(tokens).logits, before)
        assert verifier.verify(6, Draft.chain([7])).logits.isfinite().all()
    assert outer.share_weights(outer) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["drafter.inner=int3"], r"verifier 'int3' is not in conf/verifier"),
        (["drafter.inner={method: rtn}"], r"drafter\.inner has .*lacks a name of conf/verifier"),
        (["drafter.inner={name: int8, method: magic}"], r"drafter\.inner\.method=magic"),
        (["drafter.inner_drafter=nosuch"], r"drafter 'nosuch' is not in conf/drafter"),
        (["drafter.inner_drafter={name: ngram, num_tokens: 0}"], r"drafter\.inner_drafter\.num_tokens=0"),
        (["drafter.inner_drafter={name: ngram, tokens: 2}"], r"drafter\.inner_drafter has no key 'tokens'"),
        (["drafter.block=0"], r"drafter\.block=0"),
        (["drafter.block=many"], r"drafter\.block=many"),
        (["drafter.inner_drafter={name: cascade, block: -1}"], r"drafter\.inner_drafter\.block=-1"),
    ],
)
def test_wrong_values_are_refused_by_key(overrides: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build("drafter", composed_run("drafter=cascade", *overrides).drafter)


def test_a_simulation_cannot_be_an_inner_level(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.drafters.replay.read_trace", lambda trace: [None])
    with pytest.raises(RequestError, match=r"drafter\.inner_drafter=.*replay.*is a simulation"):
        CascadeDrafter("int8", {"name": "replay", "trace": "trace.jsonl"}, 4)


def test_a_draft_length_bounds_the_blocks_and_may_be_adaptive() -> None:
    outer, drafter = fp16(), cascade(int8(), NgramDrafter(), 6)
    expected = generate(NoneDrafter(), outer, [1, 2, 3], 60).tokens
    limits = Limits(60, 2048, frozenset(), draft_tokens=3)
    found = decode([1, 2, 3], drafter, outer, rule_for(GREEDY), GREEDY, limits, torch.Generator())
    assert (found.tokens, max(found.depth)) == (expected, 3)
    adaptive = AdaptiveLength(drafter, COSTS[0], clock=lambda: 0.0)
    assert generate(adaptive, outer, [1, 2, 3], 60).tokens == expected


def test_three_levels_pass_the_conformance_test() -> None:
    inner = {"name": "cascade", "inner": {"name": "int4", "method": "rtn"}, "block": 3}
    check_drafter(CascadeDrafter({"name": "int8", "method": "rtn"}, inner, 5))  # type: ignore[arg-type]
