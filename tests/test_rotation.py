"""Rotations: Hadamard matrices, and a rotated model that computes the same function with fewer outliers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from quasar.errors import RequestError
from quasar.model.config import ModelConfig
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.quantization.rotation import Rotation, hadamard, random_hadamard
from quasar.testing import tiny_model, tiny_setup
from quasar.verifiers.int4 import Int4Verifier

TOKENS = torch.arange(30) % 64
LINEARS = ("qkv_bias", "output_bias", "gate_up_bias", "down_bias")


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 96, 576, 960, 1536, 2560, 4096])
def test_hadamard_matrices_are_orthogonal(size: int) -> None:
    """576, 960, 2560 and 4096 are hidden sizes of SmolLM2 and Qwen3."""
    matrix = hadamard(size)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


@pytest.mark.parametrize("size", [3, 10, 52, 64])
def test_random_matrices_are_orthogonal_for_every_size(size: int) -> None:
    matrix = random_hadamard(size, torch.Generator().manual_seed(1))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    assert not torch.equal(matrix, random_hadamard(size, torch.Generator().manual_seed(2)))


def model_of(config: ModelConfig) -> Transformer:
    """A model whose norms and biases are not the trivial ones."""
    model = random_transformer(config, 3, torch.float32)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            middle = 1.0 if "norm" in name else 0.0
            parameter.data = middle + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, dict.fromkeys(LINEARS, True), {"qk_norm": True}],
    ids=["plain", "tied", "biases", "norms of heads"],
)
def test_a_rotated_model_computes_the_same(changes: dict[str, bool]) -> None:
    config = replace(tiny_config(vocab_size=64), **changes)
    model = model_of(config)
    expected = model(TOKENS)
    before = model.blocks[0].mlp.gate_up.weight.clone()
    rotation = Rotation(model)
    for block in model.blocks:
        rotation.rotate(block)
    assert torch.allclose(model(TOKENS), expected, atol=2e-4)
    assert not torch.allclose(model.blocks[0].mlp.gate_up.weight, before, atol=0.1)
    assert model.lm_head.weight is not model.embedding.weight


def test_outliers_are_spread() -> None:
    """One channel of the residual stream is 30 times as large as the others, in the embedding and in its readers."""
    model = model_of(tiny_config(vocab_size=64))
    model.embedding.weight.data[:, 7] *= 30
    peaks = []
    for rotated in (False, True):
        if rotated:
            rotation = Rotation(model)
            for block in model.blocks:
                rotation.rotate(block)
        table = model.embedding.weight
        peaks.append(float(table.abs().amax() / table.square().mean().sqrt()))
    assert peaks[1] < peaks[0] / 2


def test_rotation_helps_a_model_with_outliers() -> None:
    def error(rotation: str) -> float:
        model = model_of(tiny_config(vocab_size=64))
        for block in model.blocks:
            for layer in (block.attention.qkv, block.mlp.gate_up):
                assert isinstance(layer, nn.Linear)
                layer.weight.data[:, 5] *= 12
        exact = model(TOKENS)
        verifier = Int4Verifier(model, tiny_setup(), method="rtn", rotation=rotation)  # type: ignore[arg-type]
        return float((verifier.model(TOKENS) - exact).square().mean())

    assert error("hadamard") < 0.7 * error("none")


def test_layers_of_eight_bits() -> None:
    names = ["down_proj", "o_proj"]
    for activation_bits, kind in ((16, "W8A16Linear"), (8, "W8A8Linear")):
        verifier = Int4Verifier(tiny_model(), tiny_setup(), keep_8bit=names, activation_bits=activation_bits)  # type: ignore[arg-type]
        block = verifier.model.blocks[0]
        found = [type(layer).__name__ for layer in (block.attention.output, block.mlp.down)]
        assert found == [kind, kind]
        assert type(block.mlp.gate_up).__name__ == type(block.attention.qkv).__name__ == "W4Linear"


def test_rotation_and_awq_exclude_each_other() -> None:
    with pytest.raises(RequestError, match=r"choose method=gptq or method=rtn, or rotation=none"):
        Int4Verifier(tiny_model(), tiny_setup(), method="awq", rotation="hadamard")
