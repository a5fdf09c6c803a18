"""Conformance tests for drafters and verifiers. Call them from the tests of a package that implements one:

    from quasar.testing import check_drafter, check_verifier

    def test_my_drafter() -> None:
        check_drafter(MyDrafter(num_tokens=3))

    def test_my_verifier() -> None:
        check_verifier(MyVerifier(tiny_model(), Setup()))

A check raises AssertionError with a message on what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quasar.config.build import build, node_named
from quasar.decoding.acceptance import rule_for
from quasar.decoding.draft import ROOT, Context, Draft, Scratch
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters.base import Drafter, Resources
from quasar.drafters.none import NoneDrafter
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.quantization.statistics import Calibration
from quasar.verifiers.base import LayeredVerifier, Setup, Verifier
from quasar.verifiers.fp16 import FP16Verifier

VOCABULARY = 64
PROMPTS = ([5], [1, 2, 3, 1, 2, 3, 1, 2], [7, 7, 7, 7], list(range(40)))
"""Some prompts repeat themselves, so that drafters have something to propose."""
NEW_TOKENS = 24


def tiny_model(dtype: torch.dtype = torch.float32) -> Transformer:
    """Return a random Llama with 4 layers and a vocabulary of 64 tokens, the same at every call."""
    return random_transformer(tiny_config(vocab_size=VOCABULARY), 0, dtype)


def tiny_checkpoint(folder: Path) -> Path:
    """Write a random Llama with a vocabulary of 64 tokens as transformers saves it, the same at every call.

    Returns the folder, for verifiers that load their model from ``setup.folder``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_setup() -> Setup:
    """Return the `Setup` that a run gives to a verifier, with a small random calibration text."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in (50, 90, 30)]
    calibration = Calibration(sequences, {"model": "quasar.testing"})
    return Setup(calibration=lambda: calibration)


def check_drafter(drafter: Drafter, verifier: Verifier | None = None) -> None:
    """Decode several sequences with a drafter and check what it does.

    It checks that greedy output and coupled samples equal the verifier's autoregressive output (unless the drafter has
    an acceptance rule), that no draft is deeper than its budget, that notes have one value per step, that `begin`
    starts a repeated sequence from scratch, and that the probabilities of sampled drafts are valid distributions.

    verifier: the verifier to draft for; by default one with the tiny model
    """
    verifier = verifier or FP16Verifier(tiny_model(), Setup())
    drafter.prepare(_resources(verifier))
    assert isinstance(drafter.details, tuple), f"details must be a tuple of texts, not {drafter.details!r}"
    watched = _Watched(drafter)
    for prompt in PROMPTS:
        expected = _generate(NoneDrafter(), verifier, prompt)
        for length in (None, 1):
            found = _generate(watched, verifier, prompt, draft_tokens=length)
            if drafter.rule is None:
                assert found.tokens == expected.tokens, f"the draft changed the output for the prompt {prompt}"
            steps = len(found.emitted)
            assert sum(found.emitted) == steps + sum(found.accepted), "a step emits its accepted tokens and one more"
            for name, values in drafter.notes().items():
                assert len(values) == steps, f"notes()[{name!r}] has {len(values)} values for {steps} steps"
        _generate(watched, verifier, prompt, sampling=Sampling(0.8, top_k=20))
        coupled = Sampling(0.8, top_k=20, coupled=True)
        found, expected = (_generate(each, verifier, prompt, sampling=coupled) for each in (watched, NoneDrafter()))
        if drafter.rule is None:
            assert found.tokens == expected.tokens, f"the draft changed the coupled sample for the prompt {prompt}"


def check_verifier(verifier: Verifier, tolerance: float = 1e-4) -> None:
    """Prefill, verify and roll back with a verifier, and check that the logits depend only on the sequence.

    verifier:  a verifier with a vocabulary of at least 64 tokens
    tolerance: allowed relative error between the logits of two passes: 1e-4 for float32, 0.05 for bfloat16
    """
    same = partial(_assert_close, tolerance=tolerance)
    prompt, drafted = [3, 1, 4, 1, 5], [10, 11, 12]
    text = [*prompt, 9, *drafted]
    alone = verifier.teacher_forced(torch.tensor(text), 0)
    assert alone.shape[0] == len(text), f"teacher_forced gives {alone.shape[0]} rows for {len(text)} tokens"
    assert alone.isfinite().all(), "teacher_forced gives logits that are not finite"
    assert len(verifier.teacher_forced(torch.tensor(text), 6)) == len(text) - 6, "teacher_forced ignores `first`"
    same(verifier.prefill(torch.tensor(prompt)).logits, alone[4:5], "prefill")
    scores = verifier.verify(9, Draft.chain(drafted))
    same(scores.logits, alone[5:], "verify of a chain")
    assert scores.argmax() == scores.logits.argmax(-1).tolist(), "argmax() is not that of the logits"
    scores.require_finite()
    verifier.keep([0])
    after = [*prompt, 9, 10, 20]
    same(verifier.verify(20, Draft()).logits[0], _last(verifier, after), "verify after a draft was cut")
    verifier.keep([])
    tree = Draft([10, 11, 12, 13], [ROOT, 0, 0, ROOT])
    scores = verifier.verify(21, tree)
    for node, path in enumerate(([10], [10, 11], [10, 12], [13])):
        same(scores.logits[node + 1], _last(verifier, [*after, 21, *path]), f"verify of a tree, node {node}")
    verifier.keep([0, 2])
    kept = [*after, 21, 10, 12]
    same(verifier.verify(22, Draft()).logits[0], _last(verifier, [*kept, 22]), "verify after a path of a tree")
    verifier.keep([])
    if isinstance(verifier, LayeredVerifier):
        verifier.rewind(len(prompt) + 1)
        kept = [*prompt, 9]
        same(verifier.verify(22, Draft()).logits[0], _last(verifier, [*kept, 22]), "verify after rewind")
        verifier.keep([])
    _check_scratch(verifier, [*kept, 22], same)
    same(verifier.prefill(torch.tensor(prompt)).logits[0], alone[4], "prefill after another sequence")
    assert verifier.label, "label must not be empty: messages say that the output is lossless with respect to it"
    assert verifier.cost.weight_bytes > 0, "cost.weight_bytes must be the bytes of all weights that a pass reads"
    assert verifier.context_length >= len(kept), "context_length is less than the number of tokens that were read"


def _check_scratch(verifier: Verifier, context: list[int], same: Any) -> None:
    """Check that scratch rows attend to context, last token and each other by their mask, and are not cached."""
    scratch = Scratch(
        tokens=torch.tensor([30, 31, 32]),
        offsets=torch.tensor([1, 2, 2]),
        mask=torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool(),
        outputs=torch.tensor([1]),
    )
    scores = verifier.verify(23, Draft([10], [ROOT], scratch=scratch))
    assert scores.scratch is not None, "scores.scratch is None for a draft with scratch rows"
    assert len(scores.logits) == 2, f"scores.logits has {len(scores.logits)} rows for a draft of one token"
    same(scores.logits[1], _last(verifier, [*context, 23, 10]), "verify beside scratch rows")
    same(scores.scratch[0], _last(verifier, [*context, 23, 30, 31]), "a scratch row")
    verifier.keep([0])
    same(verifier.verify(24, Draft()).logits[0], _last(verifier, [*context, 23, 10, 24]), "verify after scratch rows")


class _Watched(Drafter):
    """Checks every draft before the decode loop gets it."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def begin(self, prompt: Tensor) -> None:
        self._drafter.begin(prompt)

    def propose(self, context: Context, budget: int) -> Draft:
        draft = self._drafter.propose(context, budget)
        depth = max(draft.depths(), default=0)
        assert depth <= budget, f"a draft {depth} tokens deep for a budget of {budget}"
        assert all(ROOT <= parent < node for node, parent in enumerate(draft.parents)), (
            f"parents {draft.parents}: every parent must come before its children"
        )
        assert all(0 <= token < VOCABULARY for token in draft.tokens), f"{draft.tokens}: tokens outside the vocabulary"
        if draft.probabilities is not None:
            found = draft.probabilities.float()
            assert found.shape[0] == len(draft), f"probabilities has {found.shape[0]} rows for {len(draft)} tokens"
            assert torch.allclose(found.sum(-1), torch.ones(len(draft)), atol=1e-3), "probabilities must sum to 1"
            assert (found[range(len(draft)), draft.tokens] > 0).all(), "a draft token has probability 0"
        return draft

    def observe(self, step: Any) -> None:
        self._drafter.observe(step)


def _resources(verifier: Verifier) -> Resources:
    setup = tiny_setup()

    def another(choice: str | dict[str, Any]) -> LayeredVerifier:
        node = node_named("verifier", choice) if isinstance(choice, str) else choice
        built = build("verifier", node, tiny_model(), setup)
        assert isinstance(built, LayeredVerifier)
        return built

    def encode(text: str) -> list[int]:
        return [byte % VOCABULARY for byte in text.encode()]

    return Resources(verifier, encode, another, setup.calibration, {"model": "quasar.testing"})


def _generate(
    drafter: Drafter,
    verifier: Verifier,
    prompt: Sequence[int],
    draft_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> Generation:
    sampling = sampling or Sampling()
    limits = Limits(NEW_TOKENS, verifier.context_length, frozenset(), draft_tokens)
    generator = torch.Generator(verifier.device).manual_seed(0)
    rule = drafter.rule or rule_for(sampling)
    return decode(prompt, drafter, verifier, rule, sampling, limits, generator)


def _last(verifier: Verifier, tokens: list[int]) -> Tensor:
    return verifier.teacher_forced(torch.tensor(tokens), len(tokens) - 1)[0]


def _assert_close(found: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    assert found.shape == expected.shape, f"{what}: logits have shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error <= tolerance, f"{what}: logits differ from those of one pass over the same tokens by {error:.2g}"
