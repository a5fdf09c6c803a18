"""Every step emits its accepted tokens and one more, for every drafter, acceptance rule and stop criterion."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quasar.decoding.acceptance import AcceptanceRule, Coupled, Greedy, RejectionSampling, Typical
from quasar.decoding.block_verification import BlockVerification
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits, StopStrings
from quasar.decoding.synthetic import Synthetic
from quasar.drafters._adaptive_length import AdaptiveLength
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import Drafter
from quasar.drafters.chain import ChainDrafter
from quasar.drafters.layerskip import LayerSkipDrafter
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.drafters.mixture import MixtureDrafter
from quasar.drafters.model import ModelDrafter
from quasar.drafters.ngram import NgramDrafter
from quasar.drafters.none import NoneDrafter
from quasar.drafters.recycling import RecyclingDrafter
from quasar.drafters.replay import ReplayDrafter
from quasar.drafters.suffix_automaton import SuffixAutomatonDrafter
from quasar.evaluation.fidelity import ReferencePath
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.sources import Checkpoint
from quasar.model.tokenizer import Tokenizer, load_tokenizer
from quasar.results.measured import Measured
from quasar.results.metrics import acceptance_by_position, acceptance_rate, mean_acceptance_length
from quasar.results.schema import PromptRecord, Steps
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.records import turn

VOCABULARY = 6
"""So few tokens that drafts are often accepted."""
SAMPLING = Sampling(1.0)
COUPLED = Sampling(1.0, coupled=True)
RULES: dict[str, tuple[Callable[[], AcceptanceRule], Sampling]] = {
    "greedy": (Greedy, Sampling()),
    "rejection": (lambda: RejectionSampling(SAMPLING), SAMPLING),
    "typical": (lambda: Typical(SAMPLING, 0.09, 0.3), SAMPLING),
    "coupled": (lambda: Coupled(COUPLED), COUPLED),
    "block": (lambda: BlockVerification(SAMPLING), SAMPLING),
    "synthetic": (lambda: Synthetic(SAMPLING, [0.9, 0.5]), SAMPLING),
    "reference path": (lambda: ReferencePath([3] * 60), Sampling()),
}
DECORATORS: dict[str, Callable[[Drafter], Drafter]] = {
    "alone": lambda drafter: drafter,
    "auto": lambda drafter: timeless(drafter),
    "chain": lambda drafter: chained(drafter),
    "auto of a chain": lambda drafter: timeless(chained(drafter)),
}


def timeless(drafter: Drafter) -> AdaptiveLength:
    """Every length pays, and the choice is the same in every run."""
    return AdaptiveLength(drafter, PassCost([1, 9], [100], [[10.0, 10.0]]), clock=lambda: 0.0)


def chained(drafter: Drafter) -> ChainDrafter:
    chain = ChainDrafter(["none"])
    chain.names.append("inner")
    chain.members.append(drafter)
    return chain


def verifier() -> FP16Verifier:
    return FP16Verifier(random_transformer(tiny_config(VOCABULARY, num_layers=2), 3, torch.float32), Setup(64))


def trace_of(folder: Path, drafted: list[int], accepted: list[int]) -> Path:
    file = folder / "trace.jsonl"
    file.write_text(json.dumps(PromptRecord("1", "chat", [turn(drafted, accepted)]).to_json()) + "\n")
    return file


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drafter]:
    """One of every kind, built once; `begin` starts them afresh."""
    trace = trace_of(tmp_path_factory.mktemp("trace"), [4, 2, 0, 3], [4, 1, 0, 2])
    model = ModelDrafter({}, num_tokens=4)
    model.use(verifier())
    return {
        "none": NoneDrafter(),
        "ngram": NgramDrafter(),
        "ngram tree": NgramDrafter(branches=3, match="frequent"),
        "automaton": SuffixAutomatonDrafter(scope="session"),
        "recycling": RecyclingDrafter(num_tokens=12),
        "mixture": MixtureDrafter(num_tokens=12),
        "lookahead": LookaheadDrafter(5, 4, 5),
        "lookahead auto": LookaheadDrafter(),
        "layerskip": LayerSkipDrafter(skip_layers=[1]),
        "model": model,
        "replay": ReplayDrafter(trace=trace),
    }


NAMES = (
    "none",
    "ngram",
    "ngram tree",
    "automaton",
    "recycling",
    "mixture",
    "lookahead",
    "lookahead auto",
    "layerskip",
    "model",
    "replay",
)


def generate(
    drafter: Drafter,
    rule_name: str,
    prompt: list[int],
    limits: Limits,
    seed: int = 0,
    target: FP16Verifier | None = None,
) -> tuple[Generation, list[StepResult]]:
    rule, sampling = RULES[rule_name]
    steps: list[StepResult] = []
    generator = torch.Generator().manual_seed(seed)
    chosen = rule() if rule_name == "reference path" else drafter.rule or rule()
    found = decode(prompt, drafter, target or TARGET, chosen, sampling, limits, generator, steps.append)
    return found, steps


TARGET = verifier()


def spelled(tokens: list[int]) -> str:
    return "".join("abcdef"[token] for token in tokens)


def endings() -> st.SearchStrategy[Limits]:
    strings = st.sampled_from([(), ("a",), ("cd",), ("dd", "ee"), ("abca",)])
    return st.builds(
        lambda new, context, stop, draft, texts: Limits(
            new, context, frozenset(stop), draft, StopStrings(texts, spelled) if texts else None
        ),
        st.integers(1, 30),
        st.integers(10, 60),
        st.sets(st.integers(0, VOCABULARY - 1), max_size=1),
        st.sampled_from([None, 1, 3]),
        strings,
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(NAMES),
    st.sampled_from(list(DECORATORS)),
    st.sampled_from(list(RULES)),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8),
    endings(),
    st.integers(0, 99),
)
def test_emitted_tokens_are_the_steps_and_the_accepted_tokens(
    drafters: dict[str, Drafter],
    name: str,
    decorator: str,
    rule: str,
    prompt: list[int],
    limits: Limits,
    seed: int,
) -> None:
    if name == "layerskip":
        drafters[name].use(TARGET)
    generation, steps = generate(DECORATORS[decorator](drafters[name]), rule, prompt, limits, seed)
    assert generation.emitted == [accepted + 1 for accepted in generation.accepted]
    assert sum(generation.emitted) == len(generation.emitted) + sum(generation.accepted)
    assert len(generation.tokens) == 1 + sum(generation.emitted)
    for step, accepted, drafted, depth in zip(
        steps, generation.accepted, generation.drafted, generation.depth, strict=True
    ):
        assert len(step.path) == accepted <= depth <= drafted
        assert [step.draft.tokens[node] for node in step.path] == step.emitted[:-1]
    assert not any(step.cut for step in steps[:-1])
    if steps and generation.emitted:
        # The verifier holds the whole sequence without its last token.
        assert TARGET.cache.length == len(prompt) + len(generation.tokens) - 1


def test_acceptance_of_a_step_that_a_stop_token_cuts() -> None:
    """Five tokens were right and the third one stops: two are accepted, and none of the metrics counts more."""
    record = PromptRecord("1", "chat", [turn([5], [2])])
    measured = Measured([record])
    assert acceptance_rate(measured) == pytest.approx(0.4)
    assert acceptance_by_position(measured) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert mean_acceptance_length(measured) == 3.0
    assert isinstance(record.turns[0].steps, Steps)


def test_the_adaptive_length_takes_a_cut_for_no_rejection() -> None:
    """After many answers that end inside a draft, drafts are as long as before."""
    auto = timeless(NgramDrafter(num_tokens=4))
    lengths = []
    for cut in (False, True):
        for _ in range(40):
            auto.begin(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 1]))
            draft = auto.propose(Context([1, 2, 3, 4, 1, 2, 3, 4, 1], 9, Sampling(), torch.Generator()), 8)
            path = list(range(1 if cut else len(draft)))
            emitted = draft.tokens[: len(path) + 1]
            auto.observe(StepResult(draft, emitted, path, torch.zeros(1, 1), None, cut))
        lengths.append(auto.choose(8, 9)[0])
    assert lengths[0] == lengths[1] > 1


@pytest.mark.parametrize(("decorator", "rule"), list(itertools.product(DECORATORS, list(RULES)[:3])))
def test_replay_keeps_the_recorded_acceptance(decorator: str, rule: str, tmp_path: Path) -> None:
    """Whatever the decorator, and whatever rule the run would use."""
    drafter = DECORATORS[decorator](ReplayDrafter(trace=trace_of(tmp_path, [3], [2])))
    limits = Limits(1 + 4 * 3, 4096, frozenset())
    assert drafter.rule is not None
    generation, _ = generate(drafter, rule, [1, 2, 3, 4, 5], limits, target=verifier())
    assert generation.accepted == [2] * 4
    assert generation.emitted == [3] * 4


@pytest.mark.parametrize("rule", ["greedy", "rejection", "coupled"])
@pytest.mark.parametrize("decorator", ["chain", "auto of a chain"])
def test_other_members_beside_replay_keep_the_rule_of_the_run(decorator: str, rule: str, tmp_path: Path) -> None:
    """Replay has nothing to draft here, so that the text and the acceptance are those of the other member alone."""
    model = ModelDrafter({}, num_tokens=3)
    model.use(verifier())
    replay = ReplayDrafter(trace=trace_of(tmp_path, [0], [0]))
    chain = ChainDrafter(["none"])
    chain.names, chain.members = ["replay", "model"], [replay, model]
    beside = timeless(chain) if "auto" in decorator else chain
    alone: Drafter = timeless(model) if "auto" in decorator else model
    limits = Limits(40, 4096, frozenset())
    target = verifier()
    found, _ = generate(beside, rule, [1, 2, 3], limits, target=target)
    expected, _ = generate(alone, rule, [1, 2, 3], limits, target=target)
    assert (found.tokens, found.accepted) == (expected.tokens, expected.accepted)
    if rule != "greedy":
        # A draft model that is the verifier is always right if it samples as the rule does.
        assert found.accepted == found.drafted
        assert len(set(found.tokens)) > 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Checkpoint("tiny", None, "random weights"))


def test_a_special_token_can_be_a_stop_string(tokenizer: Tokenizer) -> None:
    user = 258
    assert tokenizer.spell([user]) == "<user>"
    strings = StopStrings(["<user>"], tokenizer.decode, tokenizer.spell)
    before = tokenizer.encode("some text")
    assert not strings.completed_by_last(before)
    assert strings.completed_by_last([*before, user])
    # Text that is split by a special token is still found as it is written in the record.
    split = StopStrings(["ab"], tokenizer.decode, tokenizer.spell)
    assert split.completed_by_last([*tokenizer.encode("a"), user, *tokenizer.encode("b")])


def test_a_draft_behind_the_stop_is_not_accepted_in_the_trace_of_a_decode() -> None:
    """The published example: acceptance 0.40 where five tokens were right and the third ends the output."""

    class Right(Drafter):
        def propose(self, context: Context, budget: int) -> Draft:
            text = RIGHT[len(context.tokens) - 3 :]
            return Draft.chain(text[: min(5, budget)])

    free, _ = generate(NoneDrafter(), "greedy", [1, 2, 3], Limits(12, 4096, frozenset()))
    RIGHT = free.tokens  # noqa: N806
    strings = StopStrings([spelled(free.tokens[:4])], spelled)
    limits = Limits(12, 4096, frozenset(), stop_strings=strings)
    generation, (step,) = generate(Right(), "greedy", [1, 2, 3], limits)
    assert generation.tokens == free.tokens[:4]
    assert (generation.drafted, generation.accepted, generation.emitted) == ([5], [2], [3])
    assert step.cut
