"""Compares the decoder with transformers, and passes of blocks and trees with passes of single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from quasar.decoding.draft import ROOT, Draft, Scratch
from quasar.errors import RequestError
from quasar.model.config_file import read_config
from quasar.model.kv_cache import KVCache
from quasar.model.loading import load_transformer, random_transformer, tiny_config
from quasar.model.sources import Checkpoint
from quasar.model.transformer import ResidualStream, Rows, Transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.blocks import logits_in_blocks

SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied": LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
    "llama3-rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "linear-rope": LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "yarn-rope": Qwen3Config(**SMALL, head_dim=32, rope_parameters=YARN),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mlp-bias": LlamaConfig(**SMALL, mlp_bias=True),
    # OpenPangu-Embedded is Llama with biases on q, k, v and o.
    "openpangu": LlamaConfig(**SMALL, attention_bias=True),
}


def reference_model(config: PreTrainedConfig) -> Any:
    """Return a transformers model with random biases, because its own initialization sets them to zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.data.normal_(0, 0.1)
    return model


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = reference_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    if name == "openpangu":
        rename_to_openpangu(tmp_path)
    ours = load_transformer(tmp_path, torch.float32)
    tokens = torch.randint(0, 211, (150,))
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens[None]).logits[0]) < 1e-4


def rename_to_openpangu(folder: Path) -> None:
    """Describe the same weights as OpenPangu's own config.json does: its model_type, and one flag for all biases."""
    import json

    config = json.loads((folder / "config.json").read_text())
    del config["attention_bias"]
    config |= {"model_type": "PanguEmbedded", "architectures": ["PanguEmbeddedForCausalLM"], "bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder).output_bias
    assert read_config(folder).qkv_bias


@pytest.mark.smollm2
def test_smollm2_logits_equal_transformers(smollm2: Checkpoint) -> None:
    assert smollm2.folder is not None
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32).eval()
    ours = load_transformer(smollm2.folder, torch.float32)
    tokens = torch.randint(0, 49152, (200,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens[None]).logits[0]) < 1e-4


def test_blocks_and_rollback_equal_one_pass(tiny: Transformer) -> None:
    tokens = torch.randint(0, 64, (60,), generator=torch.Generator().manual_seed(1))
    expected = tiny(tokens)
    found = logits_in_blocks(tiny, tokens, (1, 5, 3, 8, 2, 7, 4, 9))
    assert relative_error(found, expected[19 : 19 + len(found)]) < 1e-5


def test_tree_rows_equal_separate_sequences(tiny: Transformer) -> None:
    prompt = torch.tensor([3, 1, 4, 1, 5])
    draft = Draft(tokens=[10, 11, 12, 13, 14], parents=[ROOT, 0, 0, ROOT, 3])
    verifier = FP16Verifier(tiny, Setup())
    verifier.prefill(prompt)
    logits = verifier.verify(9, draft).logits
    for node, path in enumerate([[10], [10, 11], [10, 12], [13], [13, 14]]):
        alone = tiny(torch.tensor([*prompt.tolist(), 9, *path]))[-1]
        assert relative_error(logits[node + 1], alone) < 1e-5
    verifier.keep([0, 2])  # 10, 12: not contiguous, so the cache is compacted
    after = verifier.verify(20, Draft()).logits
    assert relative_error(after[0], tiny(torch.tensor([3, 1, 4, 1, 5, 9, 10, 12, 20]))[-1]) < 1e-5


def test_scratch_rows_see_what_they_should_and_leave_no_trace(tiny: Transformer) -> None:
    prompt = torch.tensor([3, 1, 4])
    scratch = Scratch(
        tokens=torch.tensor([20, 21, 22]),
        offsets=torch.tensor([1, 2, 2]),
        mask=torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool(),
        outputs=torch.tensor([1, 2]),
    )
    verifier = FP16Verifier(tiny, Setup())
    verifier.prefill(prompt)
    scores = verifier.verify(9, Draft([10], [ROOT], scratch=scratch))
    assert scores.scratch is not None
    assert (len(scores.logits), len(scores.scratch)) == (2, 2)
    logits = torch.cat([scores.logits, scores.scratch])
    assert relative_error(logits[1], tiny(torch.tensor([3, 1, 4, 9, 10]))[-1]) < 1e-5
    assert relative_error(logits[2], tiny(torch.tensor([3, 1, 4, 9, 20, 21]))[-1]) < 1e-5
    # Row 2 skips a position: it sees the last token and itself, two positions on.
    cache = KVCache(tiny.config, 16, torch.float32, "cpu")
    tiny(torch.tensor([3, 1, 4, 9]), cache)
    cache.commit(range(4))
    alone = tiny(torch.tensor([22]), cache, offsets=torch.tensor([1]))[0]
    assert relative_error(logits[3], alone) < 1e-5
    verifier.keep([0])
    after = verifier.verify(30, Draft()).logits
    assert relative_error(after[0], tiny(torch.tensor([3, 1, 4, 9, 10, 30]))[-1]) < 1e-5


def test_rows_that_do_not_fit_into_the_cache_are_refused(tiny: Transformer) -> None:
    """The kernels check nothing and would write after the end of the cache."""
    cache = KVCache(tiny.config, 4, torch.float32, "cpu")
    tiny(torch.arange(3), cache)
    cache.commit(range(3))
    tiny(torch.arange(1), cache)
    with pytest.raises(ValueError, match="the cache has 4 slots, but 5 are needed"):
        tiny(torch.arange(2), cache)


def test_the_first_slot_may_be_a_tensor(tiny: Transformer) -> None:
    """In a captured pass, which does not know where the block ends, no row attends to the stale slots after it."""
    cache = KVCache(tiny.config, 32, torch.float32, "cpu")
    tiny(torch.arange(30), cache)
    cache.length = 5
    expected = tiny(torch.tensor([7, 8]), cache)
    found = tiny(torch.tensor([7, 8]), cache, start=torch.tensor([5]))
    assert relative_error(found, expected) < 1e-5


def test_layer_subset_skips_the_others(tiny: Transformer) -> None:
    tokens = torch.arange(10)
    expected = tiny.lm_head(tiny.norm(hidden_through(tiny, tokens, [0, 2]))[0])
    assert torch.equal(tiny(tokens, layers=[0, 2]), expected)
    assert not torch.allclose(expected, tiny(tokens))


def hidden_through(model: Transformer, tokens: torch.Tensor, layers: list[int]) -> torch.Tensor:
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    rows = Rows(model.ropes(torch.arange(len(tokens))), torch.zeros(1, dtype=torch.int64), mask)
    x = model.embed(tokens)
    for layer in layers:
        x = model.blocks[layer](ResidualStream(x), rows, None).total()
    return x


def test_random_model_depends_on_its_seed_only() -> None:
    first, again, other = (random_transformer(tiny_config(), seed, torch.float32) for seed in (0, 0, 1))
    tokens = torch.arange(20)
    assert torch.equal(first(tokens), again(tokens))
    assert not torch.allclose(first(tokens), other(tokens))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}', "MambaForCausalLM"),
        ('{"model_type": "llama", "hidden_size": 8}', "num_attention_heads"),
        ('{"model_type": ', "not valid JSON"),
    ],
)
def test_bad_config_is_named(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RequestError, match=message) as caught:
        load_transformer(tmp_path, torch.float32)
    assert "config.json" in str(caught.value)


def test_missing_and_corrupt_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"config\.json"):
        load_transformer(tmp_path, torch.float32)
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="only safetensors"):
        load_transformer(tmp_path, torch.float32)
    reference_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RequestError, match=r"model\.safetensors: corrupt or truncated"):
        load_transformer(tmp_path, torch.float32)
