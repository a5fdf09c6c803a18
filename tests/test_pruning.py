"""Compares pruned models with dense models whose weights are zero, and scores with their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.config import LayerShape, ModelConfig
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.pruning.allocation import Amount, Removal, removals
from quasar.pruning.depth import angular_distance, block_influence, residual_stream, select_layers
from quasar.pruning.importance import BlockScores, Importance, scores
from quasar.pruning.separate import SeparateTransformer
from quasar.pruning.size import block_parameters
from quasar.pruning.width import remove
from quasar.quantization.statistics import Calibration
from quasar.verifiers.base import Setup
from quasar.verifiers.pruned import PrunedVerifier

TOKENS = torch.arange(30)


def no_calibration() -> Calibration:
    raise AssertionError("this needs no calibration text")


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
        gate_up_bias=True,
        down_bias=True,
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


def zeroed(model: Transformer, chosen: list[Removal]) -> SeparateTransformer:
    """Return the dense model with the output weights of the chosen structures set to zero."""
    dense = SeparateTransformer(model)
    for block, removal in zip(dense.blocks, chosen, strict=True):
        block.mlp.down.weight.data[:, removal.channels] = 0
        for group in removal.groups:
            block.attention.output.weight.data[:, group * 64 : (group + 1) * 64] = 0
    return dense


CHOSEN = [Removal(list(range(3, 67)), [1]), Removal([], [0]), Removal([*range(100, 228)], []), Removal([], [])]


@pytest.mark.parametrize("make", [fresh, biased])
def test_width_pruning_equals_zeroed_structures(make) -> None:
    model = make()
    chosen = CHOSEN[: model.config.num_layers]
    pruned = remove(make(), chosen, None, lambda done, total: None)
    shapes = [LayerShape(2, 1, 192), LayerShape(2, 1, 256), LayerShape(4, 2, 128), LayerShape(4, 2, 256)]
    assert list(pruned.config.layers) == shapes[: len(chosen)]
    assert torch.allclose(pruned(TOKENS), zeroed(model, chosen)(TOKENS), atol=1e-4)


@pytest.mark.parametrize("make", [fresh, biased])
def test_compensation_puts_the_mean_back(make) -> None:
    """The dense oracle replaces the removed inputs by their means."""
    model = make()
    chosen = CHOSEN[: model.config.num_layers]
    means = [(torch.randn(128), torch.randn(256)) for _ in chosen]
    dense = zeroed(make(), chosen)
    for block, original, removal, (attention_mean, mlp_mean) in zip(
        dense.blocks, SeparateTransformer(model).blocks, chosen, means, strict=True
    ):
        heads = [column for group in removal.groups for column in range(group * 64, (group + 1) * 64)]
        for name, columns, mean in (
            ("attention.output", heads, attention_mean),
            ("mlp.down", removal.channels, mlp_mean),
        ):
            linear = block.get_submodule(name)
            lost = original.get_submodule(name).weight[:, columns] @ mean[columns]
            linear.bias = torch.nn.Parameter(lost if linear.bias is None else linear.bias + lost)
    pruned = remove(make(), chosen, means, lambda done, total: None)
    assert torch.allclose(pruned(TOKENS), dense(TOKENS), atol=1e-4)


def test_weakest_structures_go_first() -> None:
    model = fresh()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[:, 10:74] *= 1e-3
        for rows in (slice(64, 128), slice(160, 192), slice(224, 256)):  # q, k and v of KV group 1
            model.blocks[2].attention.qkv.weight[rows] *= 1e-3
    found = scores(model, "magnitude", no_calibration, lambda done, total: None)
    chosen = removals(model, found, Amount(0.08, heads=True))
    assert [removal.groups for removal in chosen] == [[], [], [1], []]
    assert [removal.channels for removal in chosen] == [[], list(range(10, 74)), [], []]


def test_uniform_allocation_takes_the_same_from_every_layer() -> None:
    found = scores(fresh(), "magnitude", no_calibration, lambda done, total: None)
    chosen = removals(fresh(), found, Amount(0.35, uniform=True))
    assert [len(removal.channels) for removal in chosen] == [128] * 4
    for removal, score in zip(chosen, found, strict=True):
        assert removal.channels == sorted(score.channels.argsort()[:128].tolist())


def test_scores_by_their_formulas(calibration: Calibration) -> None:
    model = biased()
    inputs = {"mlp.down": [], "attention.output": []}
    for name, rows in inputs.items():
        model.blocks[1].get_submodule(name).register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0]))
    for sequence in calibration.sequences:
        model(sequence)
    x, heads = torch.cat(inputs["mlp.down"]), torch.cat(inputs["attention.output"])
    down, output = model.blocks[1].mlp.down.weight, model.blocks[1].attention.output.weight

    def found(importance: Importance) -> BlockScores:
        return scores(biased(), importance, lambda: calibration, lambda done, total: None)[1]

    assert torch.allclose(found("wanda").channels, down.abs().sum(0) * x.square().mean(0).sqrt(), rtol=1e-4)
    variance = x.var(0, correction=0) * down.square().sum(0)
    assert torch.allclose(found("flap").channels, variance, rtol=1e-3)
    by_head = heads.var(0, correction=0) * output.square().sum(0)
    assert torch.allclose(found("flap").groups, by_head.view(2, 64).sum(1), rtol=1e-3)
    magnitude = found("magnitude").channels
    gate, up = model.blocks[1].mlp.gate_up.weight.chunk(2)
    assert torch.allclose(magnitude[7], gate[7].norm() * up[7].norm() * down[:, 7].norm())


def test_taylor_is_the_slope_of_the_loss(calibration: Calibration) -> None:
    """Against finite differences: scale one channel's output weights a little and see what the loss does."""
    found = scores(biased(), "taylor", lambda: calibration, lambda done, total: None)[0]

    def losses(change: Callable[[Transformer, float], None], step: float) -> Tensor:
        model = biased().double()
        change(model, step)
        with torch.no_grad():
            return torch.stack([F.cross_entropy(model(s[:-1]), s[1:]) for s in calibration.sequences])

    def channel(model: Transformer, step: float) -> None:
        model.blocks[0].mlp.down.weight[:, 9] *= 1 + step

    def group(model: Transformer, step: float) -> None:
        model.blocks[0].attention.output.weight[:, 64:] *= 1 + step

    for change, score in ((channel, found.channels[9]), (group, found.groups[1])):
        slope = (losses(change, 0.05) - losses(change, -0.05)) / 0.1
        assert float(score) == pytest.approx(float(slope.square().sum()), rel=3e-2)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "wanda", "flap"])
@pytest.mark.parametrize("heads", [True, False])
def test_achieved_ratio_is_near_the_wanted_one(importance: str, heads: bool, setup: Setup) -> None:
    before = block_parameters(fresh())
    verifier = PrunedVerifier(fresh(), setup, ratio=0.3, importance=importance, heads=heads)
    biases = sum(p.numel() for n, p in verifier.model.blocks.named_parameters() if n.endswith("bias"))
    assert verifier.achieved_ratio == pytest.approx(1 - block_parameters(verifier.model) / before)
    # One step of 64 channels of one layer is 0.042 of this small model, which the rounding may miss by half.
    assert abs(verifier.achieved_ratio + biases / before - 0.3) < 0.025
    assert all(shape.intermediate_size % 64 == 0 for shape in verifier.model.config.layers)


@torch.no_grad()
def test_prunes_where_the_caller_has_switched_gradients_off(setup: Setup) -> None:
    assert PrunedVerifier(fresh(), setup, ratio=0.3, importance="taylor").achieved_ratio > 0.2


def test_block_influence_and_angle_by_their_formulas(setup: Setup, calibration: Calibration) -> None:
    model = fresh()
    with torch.no_grad():
        for linear in (model.blocks[1].attention.output, model.blocks[1].mlp.down, model.blocks[2].mlp.down):
            linear.weight *= 1e-2  # block 1 does next to nothing, block 2 little
    stream = [residual_stream(model, sequence) for sequence in calibration.sequences]
    influence = block_influence(model, calibration.sequences, lambda done, total: None)
    tokens = torch.cat(stream, dim=1)
    cosine = (tokens[:-1] * tokens[1:]).sum(-1) / (tokens[:-1].norm(dim=-1) * tokens[1:].norm(dim=-1))
    assert torch.allclose(influence, (1 - cosine).mean(1), atol=1e-5)
    assert PrunedVerifier(model, setup, method="depth", ratio=0.5).num_layers == 2
    assert influence.argsort()[:2].tolist() == [1, 2]
    angles = angular_distance(fresh(), calibration.sequences, 2, lambda done, total: None)
    last = torch.stack([residual_stream(fresh(), sequence)[:, -1] for sequence in calibration.sequences])
    expected = F.cosine_similarity(last[:, 1], last[:, 3], dim=-1).arccos().mean() / torch.pi
    assert angles.shape == (3,)
    assert float(angles[1]) == pytest.approx(float(expected), rel=1e-4)


def test_depth_pruning_equals_skipping_layers() -> None:
    expected = fresh()(TOKENS, layers=[0, 3])
    verifier = PrunedVerifier(fresh(), Setup(), method="depth", layers=[1, 2])
    assert torch.equal(verifier.model(TOKENS), expected)
    assert verifier.achieved_ratio == 0.5
    assert verifier.num_layers == 2


def test_deepest_layers_but_the_last() -> None:
    def layers(ratio: float) -> list[int]:
        model = random_transformer(tiny_config(num_layers=10), 0, torch.float32)
        return select_layers(model, ratio, "deepest", no_calibration, lambda done, total: None)

    assert layers(0.3) == [6, 7, 8]
    assert layers(0.0) == []
    with pytest.raises(RequestError, match=r"use at most 0\.80"):
        layers(0.95)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        PrunedVerifier(fresh(), Setup(), ratio=ratio)


def test_ratio_that_leaves_nothing_names_the_largest(setup: Setup) -> None:
    with pytest.raises(RequestError, match=r"ratio=0\.9 would leave a layer without a KV group and .*at most 0\.66"):
        PrunedVerifier(fresh(), setup, ratio=0.9, heads=True)
    assert PrunedVerifier(fresh(), setup, ratio=0.66, heads=True).achieved_ratio == pytest.approx(0.66, abs=0.03)
    with pytest.raises(
        RequestError, match=r"ratio=0\.6 would leave a layer without 64 MLP channels; use at most 0\.49"
    ):
        PrunedVerifier(fresh(), setup, ratio=0.6)
    with pytest.raises(RequestError, match=r"verifier\.layers names \[7\], but the model's layers are 0 to 3"):
        PrunedVerifier(fresh(), Setup(), method="depth", layers=[7])
