"""Every drafter with every verifier: in float32 the greedy output is the verifier's own autoregressive output."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.decoding.acceptance import Accepted, Greedy, rule_for
from quasar.decoding.draft import ROOT, Context, Draft, StepResult
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores
from quasar.decoding.stopping import Limits
from quasar.drafters._adaptive_length import AdaptiveLength
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import Drafter
from quasar.drafters.cascade import CascadeDrafter
from quasar.drafters.chain import ChainDrafter
from quasar.drafters.layerskip import LayerSkipDrafter
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.drafters.mixture import MixtureDrafter
from quasar.drafters.model import ModelDrafter
from quasar.drafters.ngram import NgramDrafter
from quasar.drafters.none import NoneDrafter
from quasar.drafters.recycling import RecyclingDrafter
from quasar.drafters.suffix_automaton import SuffixAutomatonDrafter
from quasar.errors import RequestError
from quasar.model.loading import random_transformer, tiny_config
from quasar.verifiers.base import Setup, Verifier, VerifierCost
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from quasar.verifiers.pruned import PrunedVerifier
from quasar.verifiers.transformer import TransformerVerifier
from tests.selection import always

GREEDY = Sampling()
VERIFIERS: dict[str, Callable[..., TransformerVerifier]] = {
    "fp16": FP16Verifier,
    "int8": lambda model, setup: Int8Verifier(model, setup, method="rtn"),
    "int4": lambda model, setup: Int4Verifier(model, setup, method="rtn"),
    "int4-asymmetric": lambda model, setup: Int4Verifier(model, setup, method="rtn", symmetric=False, group_size=32),
    "pruned-width": lambda model, setup: PrunedVerifier(model, setup, ratio=0.2, importance="magnitude"),
    "pruned-depth": lambda model, setup: PrunedVerifier(model, setup, method="depth", ratio=0.25, selection="deepest"),
    "pruned-int4": lambda model, setup: PrunedVerifier(
        model, setup, ratio=0.2, importance="magnitude", quantize={"name": "int4", "method": "rtn"}
    ),
}
DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "ngram-tree": lambda: NgramDrafter(match="frequent", branches=3),
    "ngram-first": lambda: NgramDrafter(match="first"),
    "automaton": lambda: SuffixAutomatonDrafter(scope="session"),
    "automaton-paths": lambda: SuffixAutomatonDrafter(num_tokens=8, match="recent", scope="session", branches=2),
    "recycling": lambda: RecyclingDrafter(20),
    "recycling-auto": RecyclingDrafter,
    "mixture": lambda: MixtureDrafter(num_tokens=20),
    "lookahead": lambda: LookaheadDrafter(5, 4, 5),
    "lookahead-auto": LookaheadDrafter,
    "lookahead-wide": lambda: LookaheadDrafter(window=7, ngram=3, guesses=8, pool_from_prompt=False),
    "layerskip": LayerSkipDrafter,
    "layerskip-exit": lambda: LayerSkipDrafter(num_tokens=6, exit_layer=1),
    "layerskip-sure": lambda: LayerSkipDrafter(num_tokens=6, confidence=0.05),
    "model": lambda: draft_model("int4"),
    "model-pruned": lambda: draft_model("pruned-depth"),
    "cascade": lambda: cascade(5),
    "cascade-auto": lambda: cascade("auto"),
    "chain": lambda: ChainDrafter([{"name": "ngram", "n_min": 2}, {"name": "lookahead", "window": 5}, "layerskip"]),
    "auto-ngram": lambda: timeless(NgramDrafter(num_tokens=9)),
    "auto-layerskip": lambda: timeless(LayerSkipDrafter(num_tokens=9)),
}
# These are tested with every verifier, and the variants of the others only with the reference.
EVERYWHERE = ("ngram", "lookahead", "layerskip", "layerskip-exit", "model", "chain", "cascade")


def timeless(drafter: Drafter) -> AdaptiveLength:
    """Use automatic lengths with a clock that stands still, so that every run chooses the same lengths."""
    return AdaptiveLength(drafter, PassCost([1, 9], [100], [[10.0, 12.0]]), clock=lambda: 0.0)


def build(verifier: str, seed: int = 0) -> TransformerVerifier:
    return VERIFIERS[verifier](random_transformer(tiny_config(vocab_size=64), seed, torch.float32), Setup(capacity=32))


def draft_model(verifier: str) -> ModelDrafter:
    drafter = ModelDrafter({}, num_tokens=5)
    drafter.use(build(verifier))
    return drafter


def cascade(block: int | str) -> CascadeDrafter:
    drafter = CascadeDrafter("int8", "ngram", block)  # type: ignore[arg-type]
    costs = PassCost([1, 9], [100], [[10.0, 12.0]]), PassCost([1, 9], [100], [[2.0, 3.0]])
    drafter.use(build("int8"), costs if block == "auto" else None, clock=lambda: 0.0)
    return drafter


def bind(drafter: Drafter, verifier: Verifier) -> None:
    """Do what `prepare` does for drafters that use the verifier's own layers."""
    drafter = drafter.drafter if isinstance(drafter, AdaptiveLength) else drafter
    for member in drafter.members if isinstance(drafter, ChainDrafter) else [drafter]:
        if isinstance(member, LayerSkipDrafter):
            member.use(verifier, member._lent)


def generate(
    drafter: Drafter,
    verifier: Verifier,
    prompt: list[int],
    max_new_tokens: int,
    stop: frozenset[int] = frozenset(),
    context_length: int = 2048,
    draft_tokens: int | None = None,
    sampling: Sampling = GREEDY,
) -> Generation:
    limits = Limits(max_new_tokens, context_length, stop, draft_tokens)
    bind(drafter, verifier)
    return decode(prompt, drafter, verifier, rule_for(sampling), sampling, limits, torch.Generator().manual_seed(0))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(42)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("verifier_name", always(VERIFIERS, "fp16", "int8", "int4", "pruned-depth", "pruned-int4"))
def test_every_pair_reproduces_autoregressive_decoding(verifier_name: str) -> None:
    verifier = build(verifier_name)
    chosen = DRAFTERS if verifier_name == "fp16" else EVERYWHERE
    drafters = {name: DRAFTERS[name]() for name in chosen}
    accepted = dict.fromkeys(drafters, 0)
    for number, prompt in enumerate(prompts(9)):
        length = 1 + 9 * number  # every length modulo the blocks
        expected = generate(NoneDrafter(), verifier, prompt, length)
        assert len(expected.tokens) == length
        for name, drafter in drafters.items():
            generation = generate(drafter, verifier, prompt, length)
            assert generation.tokens == expected.tokens, (name, prompt, length)
            assert sum(generation.emitted) == length - 1
            accepted[name] += sum(generation.accepted)
    # If no draft were ever right, the comparison would test nothing.
    assert min(accepted.values()) > 50, accepted


def test_stop_token_inside_a_copied_block_ends_the_output_there() -> None:
    """The verifier counts 0, 1, 2, … as in the prompt, so that drafts are right beyond the stop token."""
    generation = generate(NgramDrafter(), CountingVerifier(), list(range(30)), 20, stop=frozenset({4}))
    assert generation.tokens == [0, 1, 2, 3, 4]
    assert generation.finish_reason == "stop"
    # Five were right. The token that ends the output is the step's bonus token, and those behind it do not count.
    assert (generation.accepted, generation.emitted) == ([3], [4])


# Prompt lookup finds little in random text; the test above covers it.
@pytest.mark.parametrize(
    "drafter_name",
    always(
        (name for name in DRAFTERS if "ngram" not in name and "automaton" not in name),
        *("lookahead", "layerskip", "model", "chain", "auto-layerskip", "cascade-auto"),
    ),
)
def test_stop_token_inside_a_block_ends_the_output_there(drafter_name: str) -> None:
    verifier = build("fp16")
    inside = 0
    for prompt in prompts(6):
        free = generate(DRAFTERS[drafter_name](), verifier, prompt, 64)
        # The stop token is one that a step accepted in the middle of its block.
        position = 1
        for emitted in free.emitted:
            middle = position + emitted - 2
            if emitted > 2 and free.tokens.index(free.tokens[middle]) == middle:
                stopped = generate(
                    DRAFTERS[drafter_name](), verifier, prompt, 64, stop=frozenset({free.tokens[middle]})
                )
                assert stopped.tokens == free.tokens[: middle + 1]
                assert stopped.finish_reason == "stop"
                assert sum(stopped.emitted) == middle
                inside += 1
            position += emitted
    assert inside > 0


def test_first_token_may_stop() -> None:
    verifier = build("fp16")
    first = generate(NoneDrafter(), verifier, [1, 2, 3], 5).tokens[0]
    generation = generate(NgramDrafter(), verifier, [1, 2, 3], 5, stop=frozenset({first}))
    assert (generation.tokens, generation.finish_reason, generation.emitted) == ([first], "stop", [])


@pytest.mark.parametrize("drafter_name", DRAFTERS)
def test_full_context_ends_the_output(drafter_name: str) -> None:
    verifier = build("fp16")
    expected = generate(NoneDrafter(), verifier, [1, 2, 3, 1, 2], 100, context_length=40)
    generation = generate(DRAFTERS[drafter_name](), verifier, [1, 2, 3, 1, 2], 100, context_length=40)
    assert generation.tokens == expected.tokens
    assert len(generation.tokens) == 35
    assert generation.finish_reason == "context"


@pytest.mark.parametrize("drafter_name", DRAFTERS)
@pytest.mark.parametrize("cap", [1, 2])
def test_draft_tokens_caps_the_depth(drafter_name: str, cap: int) -> None:
    verifier = build("fp16")
    capped = generate(DRAFTERS[drafter_name](), verifier, [5, 6, 5, 6, 5], 60, draft_tokens=cap)
    assert max(capped.depth) == cap
    assert capped.tokens == generate(NoneDrafter(), verifier, [5, 6, 5, 6, 5], 60).tokens


class ScriptedDrafter(Drafter):
    """Proposes the trees it is given, one per step."""

    def __init__(self, drafts: list[Draft]) -> None:
        self.drafts = drafts

    def begin(self, prompt: torch.Tensor) -> None:
        self.remaining = list(self.drafts)

    def propose(self, context: Context, budget: int) -> Draft:
        return self.remaining.pop(0) if self.remaining and budget >= 3 else Draft()

    def observe(self, step: StepResult) -> None:
        pass


@st.composite
def trees(draw: st.DrawFn) -> Draft:
    size = draw(st.integers(0, 8))
    parents: list[int] = []
    depths: list[int] = []
    for node in range(size):
        shallow = [ROOT, *(index for index in range(node) if depths[index] < 3)]
        parents.append(draw(st.sampled_from(shallow)))
        depths.append(1 if parents[-1] == ROOT else depths[parents[-1]] + 1)
    return Draft(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)), parents)


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(), max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_any_tree_leaves_the_output_unchanged(drafts: list[Draft], prompt: list[int]) -> None:
    # There are only four tokens, so that random trees are often right.
    verifier = FP16Verifier(random_transformer(tiny_config(vocab_size=4, num_layers=2), 3, torch.float32), Setup(16))
    expected = generate(NoneDrafter(), verifier, prompt, 20).tokens
    assert generate(ScriptedDrafter(drafts), verifier, prompt, 20).tokens == expected


def test_sampled_output_is_reproducible_and_survives_drafting() -> None:
    """At temperature 1 the text depends on the draws; the same generator seed gives the same text."""
    verifier = build("fp16")
    sampling = Sampling(1.0, top_k=20)
    for make in DRAFTERS.values():
        first, again = (generate(make(), verifier, [1, 2, 3, 1, 2], 60, sampling=sampling) for _ in range(2))
        assert first.tokens == again.tokens
        assert first.accepted == again.accepted


def test_layerskip_drafts_on_what_verification_wrote_one_row_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any acceptance, the kept layers read the keys and values of the whole model and compute none of them."""
    verifier, fresh = build("fp16"), build("fp16")
    drafter = LayerSkipDrafter(num_tokens=3)
    drafter.use(verifier)
    passes: list[tuple[int, list[int]]] = []
    forward = verifier.model.forward

    def watched(tokens: torch.Tensor, *others, layers: list[int] | None = None, **options) -> torch.Tensor:
        passes.append((len(tokens), layers or []))
        return forward(tokens, *others, layers=layers, **options)

    monkeypatch.setattr(verifier.model, "forward", watched)
    tokens = [1, 2, 3, 4]
    verifier.prefill(torch.tensor(tokens[:-1]))
    drafter.begin(torch.tensor(tokens[:-1]))
    kept = drafter.kept_layers(verifier.num_layers)
    for right in (0, 3, 1, 2, 3, 0):
        passes.clear()
        draft = drafter.propose(Context(tokens, 3, GREEDY, torch.Generator()), 8)
        assert passes == [(1, kept)] * 3
        fresh.prefill(torch.tensor(tokens[:-1]))
        with torch.inference_mode():
            logits = fresh.model(torch.tensor([tokens[-1], *draft.tokens[:-1]]), fresh.cache, layers=kept)
        assert draft.tokens == logits.argmax(-1).tolist()
        verifier.verify(tokens[-1], draft)
        verifier.keep(range(right))
        tokens += [*draft.tokens[:right], (tokens[-1] + 7) % 64]


def test_layerskip_drafts_carry_the_distribution_they_were_drawn_from() -> None:
    verifier = build("fp16")
    drafter = LayerSkipDrafter(num_tokens=3)
    sampling = Sampling(1.0)
    prompt = torch.tensor([1, 2, 3])
    verifier.prefill(prompt)
    drafter.use(verifier)
    drafter.begin(prompt)
    draft = drafter.propose(Context([1, 2, 3, 4], 3, sampling, torch.Generator().manual_seed(0)), budget=8)
    assert draft.probabilities is not None
    kept = drafter.kept_layers(verifier.num_layers)
    assert len(kept) < verifier.num_layers
    expected = sampling.probabilities(verifier.draft_logits(4, 0, kept))
    assert torch.allclose(draft.probabilities[0], expected, atol=1e-6)
    verifier.draft_logits(4, 0, kept)
    second = sampling.probabilities(verifier.draft_logits(draft.tokens[0], 1, kept))
    assert torch.allclose(draft.probabilities[1], second, atol=1e-6)


def test_layerskip_reads_the_weights_of_the_layers_that_it_keeps() -> None:
    verifier = build("fp16")
    drafter = LayerSkipDrafter(skip_layers=[1])
    drafter.use(verifier)
    block = sum(parameter.nbytes for parameter in verifier.model.blocks[1].parameters())
    assert drafter.weight_bytes == verifier.cost.weight_bytes - block


@pytest.mark.parametrize("verifier_name", always(["fp16", "int8", "pruned-width"], "int8"))
def test_layerskip_in_another_precision_reproduces_autoregressive_decoding(verifier_name: str) -> None:
    verifier = build(verifier_name)
    drafter = LayerSkipDrafter(num_tokens=5, skip_layers=[1])
    drafter.use(verifier, build("int4"))
    accepted = 0
    for prompt in prompts(6):
        generation = generate(drafter, verifier, prompt, 60)
        assert generation.tokens == generate(NoneDrafter(), verifier, prompt, 60).tokens
        accepted += sum(generation.accepted)
    assert accepted > 50
    with pytest.raises(RequestError, match="INT4 model cannot read the cache of the pruned model"):
        generate(drafter, build("pruned-depth"), [1], 5)


def test_layers_of_the_verifier_itself_draft_what_it_will_say() -> None:
    """A lent copy of the verifier, all but one layer of which drafts nothing wrong where that layer adds nothing."""
    verifier, copy = build("fp16"), build("fp16")
    for model in (verifier.model, copy.model):
        model.blocks[1].attention.output.weight.data.zero_()
        model.blocks[1].mlp.down.weight.data.zero_()
    drafter = LayerSkipDrafter(num_tokens=4, skip_layers=[1])
    drafter.use(verifier, copy)
    for prompt in prompts(4):
        generation = generate(drafter, verifier, prompt, 41)
        assert generation.emitted == [5] * 8


def test_draft_model_that_is_the_verifier_is_always_right() -> None:
    """Its cache must contain exactly the context, also after shortened drafts; otherwise some draft would be wrong."""
    verifier = build("fp16")
    for draft_tokens in (None, 2):
        for prompt in prompts(6):
            generation = generate(draft_model("fp16"), verifier, prompt, 50, draft_tokens=draft_tokens)
            assert generation.accepted == generation.drafted
            assert generation.tokens == generate(NoneDrafter(), verifier, prompt, 50).tokens


def test_draft_model_catches_up_with_what_others_drafted() -> None:
    """In a chain it does not draft in every step, and its later drafts are still always right."""
    verifier, model = build("fp16"), draft_model("fp16")
    chain = ChainDrafter([{"name": "ngram", "n_min": 2}])
    chain.names.append("model")
    chain.members.append(model)
    asked = 0
    for prompt in prompts(8):
        generation = generate(chain, verifier, prompt, 70)
        assert generation.tokens == generate(NoneDrafter(), verifier, prompt, 70).tokens
        winners = chain.notes()["member"]
        for winner, drafted, accepted in zip(winners, generation.drafted, generation.accepted, strict=True):
            assert winner != "model" or drafted == accepted
        asked += sum(1 for first, then in pairwise(winners) if (first, then) == ("ngram", "model"))
    assert asked > 3


def test_rejected_draft_tokens_leave_the_draft_models_cache() -> None:
    """After any rejected draft, the draft model's next logits are those after the context alone."""
    fresh = build("int4")
    drafter = draft_model("int4")
    context = Context([1, 2, 3, 4], 3, GREEDY, torch.Generator())
    drafter.begin(torch.tensor([1, 2, 3]))
    for right in (0, 2, 5, 1, 0):
        draft = drafter.propose(context, 5)
        assert draft.tokens[0] == int(fresh.prefill(torch.tensor(context.tokens)).logits.argmax())
        emitted = [*draft.tokens[:right], (draft.tokens[min(right, 4)] + 1) % 64]
        context.tokens += emitted
        drafter.observe(StepResult(draft, emitted, list(range(right)), torch.zeros(6, 64), None))


def test_draft_model_samples_from_the_distributions_it_names() -> None:
    fresh = build("int4")
    drafter = draft_model("int4")
    sampling = Sampling(0.7, top_k=30)
    drafter.begin(torch.tensor([1, 2, 3]))
    draft = drafter.propose(Context([1, 2, 3, 4], 3, sampling, torch.Generator().manual_seed(5)), 3)
    assert draft.probabilities is not None
    for position in range(3):
        logits = fresh.prefill(torch.tensor([1, 2, 3, 4, *draft.tokens[:position]])).logits[0]
        assert torch.allclose(draft.probabilities[position], sampling.probabilities(logits), atol=1e-5)
        assert draft.probabilities[position][draft.tokens[position]] > 0


def test_chain_takes_the_first_offer_and_lets_scratch_rows_ride() -> None:
    """Prompt lookup finds nothing at first; lookahead's empty draft lends its window to layer-skip's tokens."""
    verifier = build("fp16")
    chain = ChainDrafter(
        [{"name": "ngram", "n_min": 3}, {"name": "lookahead", "window": 5, "pool_from_prompt": False}, "layerskip"]
    )
    context = Context([1, 2, 3, 4], 3, GREEDY, torch.Generator())
    verifier.prefill(torch.tensor([1, 2, 3]))
    bind(chain, verifier)
    chain.begin(torch.tensor([1, 2, 3]))
    draft = chain.propose(context, 4)
    assert draft.scratch is not None
    assert len(draft) == 4
    assert chain.notes() == {"member": ["layerskip"]}
    lookahead = chain.members[1]
    before = [list(level) for level in lookahead._jacobi.levels]
    scores = verifier.verify(4, draft)
    assert scores.scratch is not None
    chain.observe(StepResult(draft, [9], [], scores.logits, scores.scratch))
    assert len(lookahead._jacobi.levels) == len(before) + 1
    assert lookahead._jacobi.levels[-1] == scores.scratch.argmax(-1).tolist()
    context.tokens += [1, 2, 3]
    draft = chain.propose(context, 4)
    assert (draft.tokens, draft.scratch) == ([4, 1, 2, 3], None)
    assert chain.notes() == {"member": ["layerskip", "ngram"]}


def test_confidence_ends_a_draft_with_its_first_doubtful_token() -> None:
    verifier = build("fp16")
    context = Context([1, 2, 3, 4], 3, GREEDY, torch.Generator())
    verifier.prefill(torch.tensor([1, 2, 3]))
    free = LayerSkipDrafter(num_tokens=6)
    free.use(verifier)
    free.begin(torch.tensor([1, 2, 3]))
    tokens = free.propose(context, 6).tokens
    layers = free.kept_layers(verifier.num_layers)
    sure = [
        float(verifier.draft_logits(token, offset, layers).softmax(-1).max())
        for offset, token in enumerate([4, *tokens[:-1]])
    ]
    for threshold in (0.01, 0.99 * sure[0], 1.01 * sure[0], 0.999):
        drafter = LayerSkipDrafter(num_tokens=6, confidence=threshold)
        drafter.use(verifier)
        drafter.begin(torch.tensor([1, 2, 3]))
        doubtful = next((index for index, value in enumerate(sure) if value < threshold), 5)
        assert drafter.propose(context, 6).tokens == tokens[: doubtful + 1]


class CountingVerifier:
    """Emits 0, 1, 2, … and records its arguments."""

    cost = VerifierCost(0, 0)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.kept: list[list[int]] = []

    def prefill(self, tokens: torch.Tensor) -> Scores:
        return Scores(torch.nn.functional.one_hot(torch.tensor(0), 100).float().unsqueeze(0))

    def verify(self, last: int, draft: Draft) -> Scores:
        self.calls.append((last, len(draft)))
        rows = [last + 1, *(token + 1 for token in draft.tokens)]
        return Scores(torch.nn.functional.one_hot(torch.tensor(rows), 100).float())

    def keep(self, path: list[int]) -> None:
        self.kept.append(list(path))


def test_counts_of_a_hand_made_decode() -> None:
    """Drafts 1 2 9 after 0: two accepted of three, bonus 3. Then 4 5: both accepted, bonus 6. Then nothing."""
    verifier = CountingVerifier()
    drafter = ScriptedDrafter([Draft.chain([1, 2, 9]), Draft.chain([4, 5]), Draft()])
    generation = generate(drafter, verifier, [50, 51], 8)
    assert generation.tokens == [0, 1, 2, 3, 4, 5, 6, 7]
    assert verifier.calls == [(0, 3), (3, 2), (6, 0)]
    assert verifier.kept == [[0, 1], [0, 1], []]
    assert generation.drafted == [3, 2, 0]
    assert generation.depth == [3, 2, 0]
    assert generation.accepted == [2, 2, 0]
    assert generation.emitted == [3, 3, 1]
    assert generation.context == [2, 5, 8]
    assert {phase: len(laps) for phase, laps in generation.milliseconds.items()} == {
        "prefill": 1,
        "draft": 3,
        "verify": 3,
        "overhead": 3,
        "observe": 3,
    }


def test_the_loop_trusts_the_rule_alone() -> None:
    """If the rule accepts nothing, every draft is useless."""

    class Never(Greedy):
        def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
            return Accepted([], scores.argmax()[0])

    limits = Limits(6, 100, frozenset())
    drafter = ScriptedDrafter([Draft.chain([1, 2, 3])] * 9)
    generation = decode([50], drafter, CountingVerifier(), Never(), GREEDY, limits, torch.Generator())
    assert generation.tokens == [0, 1, 2, 3, 4, 5]
    assert set(generation.emitted) == {1}
