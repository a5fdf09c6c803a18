"""Pruned models against dense models with the same weights set to zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from quasar.errors import RequestError
from quasar.model.config import LayerShape, ModelConfig
from quasar.model.loading import load_transformer, random_transformer, save_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.pruning.depth import deep_layers
from quasar.pruning.separate import SeparateBlock, SeparateTransformer
from quasar.pruning.size import block_parameters
from quasar.pruning.width import channel_importance
from quasar.verifiers.base import Setup
from quasar.verifiers.pruned import PrunedVerifier

TOKENS = torch.arange(30)


def fresh() -> Transformer:
    return random_transformer(tiny_config(vocab_size=64), 0, torch.float32)


def biased() -> Transformer:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=128,
        head_dim=32,
        layers=(LayerShape(4, 2, 256),) * 2,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )
    return random_transformer(config, 1, torch.float32)


@pytest.mark.parametrize("make", [fresh, biased])
def test_separate_projections_compute_the_same(make) -> None:
    model = make()
    expected = model(TOKENS)
    separate = SeparateTransformer(model)
    assert torch.allclose(separate(TOKENS), expected, atol=1e-5)
    assert torch.allclose(separate.fused()(TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("make", [fresh, biased])
@pytest.mark.parametrize("ratio", [0.15, 0.3])
def test_width_pruning_equals_zeroed_channels(make, ratio: float) -> None:
    verifier = PrunedVerifier(make(), Setup(), method="width", ratio=ratio)
    width = verifier.model.config.layers[0].intermediate_size
    assert width < 256
    assert width % 64 == 0
    dense = SeparateTransformer(make())
    for block in dense.blocks:
        assert isinstance(block, SeparateBlock)
        weakest = channel_importance(block).argsort()[: 256 - width]
        block.mlp.down.weight.data[:, weakest] = 0
    assert torch.allclose(verifier.model(TOKENS), dense(TOKENS), atol=1e-4)


def test_weakest_channels_go_first() -> None:
    model = fresh()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[:, 10:74] *= 1e-3
    pruned = PrunedVerifier(model, Setup(), ratio=0.17).model
    assert pruned.config.layers[1].intermediate_size == 192
    kept = torch.cat([fresh().blocks[1].mlp.down.weight[:, :10], fresh().blocks[1].mlp.down.weight[:, 74:]], dim=1)
    assert torch.equal(pruned.blocks[1].mlp.down.weight, kept)


def test_depth_pruning_equals_skipping_layers() -> None:
    expected = fresh()(TOKENS, layers=[0, 3])
    verifier = PrunedVerifier(fresh(), Setup(), method="depth", layers=[1, 2])
    assert torch.equal(verifier.model(TOKENS), expected)
    assert verifier.achieved_ratio == 0.5
    assert verifier.num_layers == 2


def test_ratio_counts_parameters_of_the_blocks() -> None:
    before = block_parameters(fresh())
    verifier = PrunedVerifier(fresh(), Setup(), ratio=0.3)
    assert verifier.achieved_ratio == pytest.approx(1 - block_parameters(verifier.model) / before)
    assert abs(verifier.achieved_ratio - 0.3) < 0.09  # one step of 64 channels is 0.17 of this small model


def test_deep_layers_keep_the_last() -> None:
    assert deep_layers(10, 0.3) == [6, 7, 8]
    assert deep_layers(10, 0.0) == []
    with pytest.raises(RequestError, match=r"use at most 0\.80"):
        deep_layers(10, 0.95)


def test_pruned_model_reloads_identically(tmp_path: Path) -> None:
    pruned = PrunedVerifier(biased(), Setup(), ratio=0.3).model
    save_transformer(pruned, tmp_path)
    assert torch.equal(load_transformer(tmp_path, torch.float32)(TOKENS), pruned(TOKENS))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        PrunedVerifier(fresh(), Setup(), ratio=ratio)


def test_ratio_beyond_the_mlps_names_the_largest() -> None:
    with pytest.raises(RequestError, match=r"verifier\.ratio=0\.9: .* use at most 0\.4"):
        PrunedVerifier(fresh(), Setup(), ratio=0.9)
    with pytest.raises(RequestError, match=r"verifier\.layers names \[7\], but the model's layers are 0 to 3"):
        PrunedVerifier(fresh(), Setup(), method="depth", layers=[7])
