"""The decode loop against a slow, obvious simulation, on thousands of random texts, drafts and endings."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import ROOT, Context, Draft, StepResult
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores
from quasar.decoding.stopping import Limits, StopStrings
from quasar.drafters.base import Drafter
from quasar.verifiers.base import VerifierCost

LETTERS = "abc."
STOP_TOKEN = 3


class ReciteVerifier:
    """Its greedy output is a given text for any prompt. After other text it emits token 0."""

    cost = VerifierCost(0, 0)
    device = torch.device("cpu")

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.position = 0

    def prefill(self, tokens: torch.Tensor) -> Scores:
        self.position = 0
        return Scores(self._after(self.text[0]).unsqueeze(0))

    def verify(self, last: int, draft: Draft) -> Scores:
        assert last == self.text[self.position]
        depths = [0, *draft.depths()]
        on_text = [True]
        for token, parent, depth in zip(draft.tokens, draft.parents, depths[1:], strict=True):
            on_text.append(on_text[parent + 1] and token == self.text[self.position + depth])
        following = [
            self.text[self.position + depth + 1] if right else 0 for depth, right in zip(depths, on_text, strict=True)
        ]
        return Scores(torch.stack([self._after(token) for token in following]))

    def keep(self, path: list[int]) -> None:
        self.position += len(path) + 1

    def _after(self, token: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(token), len(LETTERS)).float()


class GivenDrafts(Drafter):
    """Proposes given drafts, one per step, without regard to the budget."""

    def __init__(self, drafts: list[Draft]) -> None:
        self.drafts = drafts
        self.steps: list[StepResult] = []

    def begin(self, prompt: torch.Tensor) -> None:
        self.remaining = iter(self.drafts)

    def propose(self, context: Context, budget: int) -> Draft:
        return next(self.remaining, Draft())

    def observe(self, step: StepResult) -> None:
        self.steps.append(step)


@dataclass(frozen=True)
class Ending:
    max_new_tokens: int
    context_length: int
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...]


def spelled(tokens: list[int]) -> str:
    return "".join(LETTERS[token] for token in tokens)


def expected_output(text: list[int], prompt_length: int, ending: Ending) -> tuple[list[int], str]:
    """Return the shortest prefix of the text that ends for one of the reasons, by trying every length."""
    for length in range(1, len(text) + 1):
        output = text[:length]
        if output[-1] in ending.stop_tokens or any(stop in spelled(output) for stop in ending.stop_strings):
            return output, "stop"
        if length == ending.max_new_tokens:
            return output, "length"
        if prompt_length + length == ending.context_length:
            return output, "context"
    raise AssertionError("the text is too short for the test")


def expected_steps(output: list[int], text: list[int], drafts: list[Draft]) -> list[int]:
    """Tokens that each step emits: the deepest draft path on the text, plus one, as far as the output goes."""
    steps: list[int] = []
    done = 1
    while done < len(output):
        draft = drafts[len(steps)] if len(steps) < len(drafts) else Draft()
        right = [path for path in paths(draft) if path == tuple(text[done : done + len(path)])]
        steps.append(min(max(map(len, right)) + 1, len(output) - done))
        done += steps[-1]
    return steps


def paths(draft: Draft) -> list[tuple[int, ...]]:
    """Return every path from the root as tokens, the empty one first."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*found[parent + 1], token))
    return found


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    """Return a chain or a tree with distinct siblings."""
    tokens: list[int] = []
    parents: list[int] = []
    for _ in range(draw(st.integers(0, 7))):
        parent = draw(st.sampled_from([ROOT, *range(len(tokens)), *[len(tokens) - 1] * 5]))
        taken = {token for token, other in zip(tokens, parents, strict=True) if other == parent}
        free = [token for token in range(len(LETTERS)) if token not in taken]
        if free:
            tokens.append(draw(st.sampled_from(free)))
            parents.append(parent)
    return Draft(tokens, parents)


endings = st.builds(
    Ending,
    st.integers(1, 25),
    st.integers(6, 40),
    st.sampled_from([frozenset(), frozenset({STOP_TOKEN})]),
    st.sampled_from([(), ("cab",), ("aa", "b."), ("abcabcabc",), ("c",)]),
)


def run(text: list[int], proposals: list[Draft], prompt_length: int, ending: Ending) -> tuple[Generation, GivenDrafts]:
    strings = StopStrings(ending.stop_strings, spelled) if ending.stop_strings else None
    limits = Limits(ending.max_new_tokens, ending.context_length, ending.stop_tokens, stop_strings=strings)
    drafter = GivenDrafts(proposals)
    prompt = [0] * prompt_length
    generation = decode(prompt, drafter, ReciteVerifier(text), Greedy(), Sampling(), limits, torch.Generator())
    return generation, drafter


@settings(max_examples=2000, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=60, max_size=60),
    st.lists(drafts(), max_size=12),
    st.integers(1, 5),
    endings,
)
def test_output_and_steps_are_those_of_the_simulation(
    text: list[int], proposals: list[Draft], prompt_length: int, ending: Ending
) -> None:
    output, reason = expected_output(text, prompt_length, ending)
    generation, drafter = run(text, proposals, prompt_length, ending)
    assert (generation.tokens, generation.finish_reason) == (output, reason)
    assert generation.emitted == expected_steps(output, text, proposals)
    assert [len(step.emitted) for step in drafter.steps] == generation.emitted


@settings(max_examples=1000, deadline=None)
@given(st.data(), st.lists(st.integers(0, 3), min_size=60, max_size=60), endings)
def test_right_drafts_end_where_the_text_does(data: st.DataObject, text: list[int], ending: Ending) -> None:
    """Drafts copied from the text are accepted whole, so that every ending falls inside a block sooner or later."""
    proposals, position = [], 1
    while position < 50:
        length = data.draw(st.integers(0, 6))
        proposals.append(Draft.chain(text[position : position + length]))
        position += length + 1
    output, reason = expected_output(text, 3, ending)
    generation, _ = run(text, proposals, 3, ending)
    assert (generation.tokens, generation.finish_reason) == (output, reason)
    assert generation.emitted == expected_steps(output, text, proposals)


@pytest.mark.parametrize(
    ("stop", "tokens"),
    [
        (("b",), [0, 1]),
        (("cc",), [0, 1, 2, 2]),
        (("abcc.",), [0, 1, 2, 2, 3]),
        (("x", "."), [0, 1, 2, 2, 3]),
    ],
)
def test_stop_string_inside_a_block_ends_the_output_with_the_token_that_completes_it(
    stop: tuple[str, ...], tokens: list[int]
) -> None:
    text = [0, 1, 2, 2, 3, *[0] * 50]
    generation, _ = run(text, [Draft.chain(text[1:8])], 2, Ending(20, 40, frozenset(), stop))
    assert (generation.tokens, generation.finish_reason) == (tokens, "stop")
    # All seven were right. The tokens after the stop string are dropped, and are not accepted either.
    assert (generation.accepted, generation.emitted) == ([len(tokens) - 2], [len(tokens) - 1])


def test_stop_strings_are_found_across_tokens_of_several_bytes() -> None:
    """A character of four bytes has four tokens, which decode to no complete character before the last one."""
    data = "🙂".encode()
    strings = StopStrings(["🙂"], lambda tokens: bytes(tokens).decode(errors="replace"))
    output = list(b"a text of some length ") + list(data)
    assert not strings.completed_by_last(output[:-1])
    assert strings.completed_by_last(output)
