"""Compares quantizers with hand-made cases, independent formulas and libraries, and ops with their definitions."""

from __future__ import annotations

import pytest
import quasar_kernels
import torch
from quasar_kernels import Int4Weight, reference
from torch import Tensor, nn

from quasar.errors import QuasarError, RequestError
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Block, Transformer
from quasar.quantization.awq import awq_scales, clipped_grid
from quasar.quantization.gptq import gptq_int4
from quasar.quantization.layers import W8A8Linear, W8A16Linear
from quasar.quantization.rounding import Grid4, grid_int4, quantize_int8, restore_int4, round_int4
from quasar.quantization.smoothing import LAYERS, best_smoothing, fold, foldable, smoothquant_scales, w8a8_error
from quasar.quantization.statistics import Calibration, LinearStatistics, collect
from quasar.verifiers.base import Setup
from quasar.verifiers.bnb import Bnb4BitVerifier, BnbInt8Verifier
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from tests import definitions

TOKENS = torch.arange(40) % 64


def fresh(dtype: torch.dtype = torch.float32) -> Transformer:
    return random_transformer(tiny_config(vocab_size=64), 0, dtype)


def test_int8_of_a_hand_made_row() -> None:
    quantized = quantize_int8(torch.tensor([[0.0, 1.27, -0.635, 0.014], [0.0, 0.0, 0.0, 0.0]]))
    assert torch.allclose(quantized.scales, torch.tensor([0.01, 1.0]))
    assert quantized.values.tolist() == [[0, 127, -64, 1], [0, 0, 0, 0]]  # -63.5 rounds to even


def test_int4_of_hand_made_groups() -> None:
    weight = torch.tensor([[0.7, -0.7, 0.1, 0.0, 1.5, 0.0, 0.3, 0.8]])
    grid = grid_int4(weight, group_size=4, symmetric=True, clip=False)
    assert torch.allclose(grid.scales, torch.tensor([[0.1, 1.5 / 7]]))
    assert grid.zeros.tolist() == [[8, 8]]
    assert round_int4(weight, grid).tolist() == [[15, 1, 9, 8, 15, 8, 9, 12]]
    grid = grid_int4(weight, group_size=4, symmetric=False, clip=False)
    assert torch.allclose(grid.scales, torch.tensor([[1.4 / 15, 0.1]]))
    assert grid.zeros.tolist() == [[8, 0]]  # 7.5 rounds to even
    assert round_int4(weight, grid).tolist() == [[15, 0, 9, 8, 15, 0, 3, 8]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_error_is_half_a_step(symmetric: bool, group_size: int) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    grid = grid_int4(weight, group_size, symmetric, clip=False)
    error = (restore_int4(round_int4(weight, grid), grid) - weight).abs().view(48, -1, group_size)
    # An asymmetric zero point is rounded too, which costs another half step at the range's ends.
    bound = grid.scales.unsqueeze(2) * (0.5 if symmetric else 1.0)
    assert (error <= bound * 1.0001).all()


def test_int4_reproduces_weights_on_its_grid() -> None:
    """Weights that lie on an asymmetric grid in groups of 32 survive: lossless by construction."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (8, 4, 32), generator=generator)
    q[..., 0], q[..., 1] = 0, 15  # every group spans the grid
    scales = torch.rand(8, 4, 1, generator=generator) + 0.1
    weight = ((q - 5) * scales).view(8, 128)
    grid = grid_int4(weight, 32, symmetric=False)
    packed = reference.pack_int4(round_int4(weight, grid))
    assert torch.allclose(reference.dequantize_int4(packed, grid.scales, grid.zeros), weight, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_lowers_the_error_that_it_weighs(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 128, generator=generator) ** 3
    importance = torch.rand(128, generator=generator)

    def errors(grid: Grid4) -> Tensor:
        change = (restore_int4(round_int4(weight, grid), grid) - weight).square() * importance
        return change.view(64, 4, 32).sum(2)

    plain = errors(grid_int4(weight, 32, symmetric, clip=False))
    clipped = errors(grid_int4(weight, 32, symmetric, importance))
    assert (clipped <= plain * 1.0001).all()
    assert clipped.sum() < 0.98 * plain.sum()


def test_gptq_of_a_small_hessian_by_hand() -> None:
    """One row, two columns: rounding 0.6 to 1 moves the next weight by 0.4 · H₀₁ / H₁₁ = 0.2, from 0.4 to 0.2."""
    grid = Grid4(torch.ones(1, 1), torch.full((1, 1), 8.0))
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert round_int4(torch.tensor([[0.6, 0.6]]), grid).tolist() == [[9, 9]]
    # (1 - 0.6) * 1 / 2 = 0.2 is taken from the second weight: 0.6 - 0.2 = 0.4 rounds down.
    assert gptq_int4(torch.tensor([[0.6, 0.6]]), hessian, grid, damping=0.0, reorder=False).tolist() == [[9, 8]]
    # If the inputs are uncorrelated, there is nothing to correct.
    assert gptq_int4(torch.tensor([[0.6, 0.6]]), torch.eye(2), grid, damping=0.0, reorder=False).tolist() == [[9, 9]]


@pytest.mark.parametrize("columns", [96, 160])  # within one block of columns, and over its border
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_equals_optimal_brain_quantization_in_order(columns: int, symmetric: bool) -> None:
    """The oracle inverts what is left of the Hessian anew for every column (Frantar et al. 2023, equation 3)."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(6, columns, generator=generator)
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = inputs.T @ inputs / 400
    grid = grid_int4(weight, 32, symmetric)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    left, expected = weight.double(), torch.empty(6, columns, dtype=torch.uint8)
    for column in range(columns):
        inverse = torch.linalg.inv(damped[column:, column:])
        scale, zero = grid.scales[:, column // 32].double(), grid.zeros[:, column // 32].double()
        q = (torch.round(left[:, column] / scale) + zero).clamp(0, 15)
        expected[:, column] = q.to(torch.uint8)
        error = (left[:, column] - (q - zero) * scale) / inverse[0, 0]
        left[:, column:] -= torch.outer(error, inverse[0])
    found = gptq_int4(weight, hessian, grid, damping=0.01, reorder=False)
    assert (found == expected).float().mean() > 0.995  # float32 against float64: a tie may fall either way
    reordered = gptq_int4(weight, hessian, grid)

    def output_error(values: Tensor) -> float:
        return float(((restore_int4(values, grid) - weight) @ inputs.T).square().mean())

    assert output_error(found) < 0.7 * output_error(round_int4(weight, grid))
    assert output_error(reordered) < 0.7 * output_error(round_int4(weight, grid))


def test_smoothquant_scales_follow_equation_4() -> None:
    statistics = LinearStatistics(torch.tensor([4.0, 16.0]), *[torch.ones(2)] * 3, torch.ones(1, 2))
    weight = torch.tensor([[1.0, -4.0], [-0.25, 2.0]])
    assert torch.allclose(smoothquant_scales(statistics, weight, 0.5), torch.tensor([2.0, 2.0]))
    assert torch.allclose(smoothquant_scales(statistics, weight, 1.0), torch.tensor([4.0, 16.0]))
    assert torch.allclose(smoothquant_scales(statistics, weight, 0.0), torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize("layer", LAYERS)
def test_folding_scales_changes_nothing(layer: str, calibration: Calibration) -> None:
    model = fresh()
    block = model.blocks[1]
    assert isinstance(block, Block)
    before = block.get_submodule(layer).weight.clone()
    expected = model(TOKENS)
    scales = torch.rand(before.shape[1], generator=torch.Generator().manual_seed(3)) + 0.5
    fold(block, layer, foldable(block, layer, scales))
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)
    assert not torch.allclose(block.get_submodule(layer).weight, before)


def test_searched_smoothing_is_no_worse_than_any_fixed_one(calibration: Calibration) -> None:
    model = fresh()
    block = model.blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        block.mlp_norm.weight[5] = 40.0  # an outlier channel, what SmoothQuant is for
    statistics = calibration.statistics(model, lambda done, total: None)["blocks.0.mlp.gate_up"]
    weight = block.mlp.gate_up.weight
    alpha, scales = best_smoothing(statistics, weight, block, "mlp.gate_up")
    error = w8a8_error(statistics.samples, weight, scales)
    assert alpha > 0
    assert error < 0.2 * w8a8_error(statistics.samples, weight, torch.ones(128))
    for fixed in (0.3, 0.5, 0.9):
        fixed_scales = smoothquant_scales(statistics, weight, fixed)
        assert error <= w8a8_error(statistics.samples, weight, fixed_scales) * 1.0001


def test_smoothquant_equals_rounding_the_smoothed_weights(calibration: Calibration) -> None:
    """Alpha 0.5 by the formula, layer by layer on a dense model, then plain W8A8."""
    found = Int8Verifier(fresh(), Setup(calibration=lambda: calibration), method="smoothquant", alpha=0.5).model
    statistics, dense = collect(fresh(), calibration.sequences, 0, lambda done, total: None), fresh()
    for index, block in enumerate(dense.blocks):
        for layer in LAYERS:
            of = statistics[f"blocks.{index}.{layer}"]
            weight = block.get_submodule(layer).weight
            scales = (of.absmax**0.5 / weight.abs().amax(0) ** 0.5).clamp(min=1e-5)
            fold(block, layer, foldable(block, layer, scales))
    smoothed = dense.blocks[2].mlp.down.weight
    layer = found.blocks[2].mlp.down
    assert isinstance(layer, W8A8Linear)
    assert torch.allclose(layer.weight.values * layer.weight.scales.unsqueeze(1), smoothed, atol=0.01)
    assert torch.equal(layer.weight.values, quantize_int8(smoothed).values)


def test_awq_protects_channels_of_large_activations(calibration: Calibration) -> None:
    model = fresh()
    block = model.blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        block.mlp_norm.weight[5] = 20.0
    statistics = calibration.statistics(model, lambda done, total: None)["blocks.0.mlp.gate_up"]
    weight = block.mlp.gate_up.weight
    scales = awq_scales(statistics, weight, 64, True, block, "mlp.gate_up")
    assert scales.argmax() == 5

    def output_error(change: Tensor) -> float:
        return float((statistics.samples @ change.T).square().mean())

    def error(scale: Tensor, grid: Grid4) -> float:
        return output_error(restore_int4(round_int4(weight * scale, grid), grid) / scale - weight)

    plain = error(torch.ones(128), grid_int4(weight, 64, True, clip=False))
    scaled = error(scales, grid_int4(weight * scales, 64, True, clip=False))
    clipped = error(scales, clipped_grid(weight * scales, statistics.samples / scales, 64, True))
    assert scaled < 0.5 * plain
    assert clipped < scaled


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_int4_is_closer_than_rounding(method: str, calibration: Calibration) -> None:
    def with_outliers() -> Transformer:
        model = fresh()
        with torch.no_grad():
            for block in model.blocks:
                block.attention_norm.weight[::17] = 6.0
                block.mlp_norm.weight[::17] = 6.0
        return model

    expected = with_outliers()(TOKENS)

    def error(**options: object) -> float:
        verifier = Int4Verifier(with_outliers(), Setup(calibration=lambda: calibration), group_size=32, **options)
        return float((verifier.model(TOKENS) - expected).square().mean())

    assert error(method=method) < 0.9 * error(method="rtn", clip=False)


def test_methods_that_watch_activations_need_calibration(tiny: Transformer) -> None:
    with pytest.raises(RequestError, match=r"verifier\.method=gptq needs calibration text; set calibration\.prompts"):
        Int4Verifier(tiny, Setup())


def test_statistics_are_those_of_all_tokens_and_cached(calibration: Calibration) -> None:
    model = fresh()
    found = calibration.statistics(model, lambda done, total: None)["blocks.0.attention.qkv"]
    block = model.blocks[0]
    x = torch.cat([block.attention_norm(model.embedding(sequence))[0] for sequence in calibration.sequences])
    assert torch.allclose(found.absmax, x.abs().amax(0))
    assert torch.allclose(found.mean, x.mean(0), atol=1e-6)
    assert torch.allclose(found.mean_absolute, x.abs().mean(0), atol=1e-6)
    assert torch.allclose(found.mean_square, x.square().mean(0), atol=1e-5)
    assert len(found.samples) == 170  # fewer tokens than rows wanted: all of them, in order
    assert torch.allclose(found.samples, x, atol=1e-6)
    with torch.no_grad():
        model.embedding.weight.zero_()
    again = calibration.statistics(model, lambda done, total: None)["blocks.0.attention.qkv"]
    assert torch.equal(again.mean, found.mean)
    other = calibration.statistics(model.bfloat16(), lambda done, total: None)["blocks.0.attention.qkv"]
    assert not torch.equal(other.mean, found.mean), "statistics of one precision must not serve another"


@pytest.mark.parametrize(
    ("verifier", "method"), [(Int8Verifier, "smoothquant"), (Int8Verifier, "gptq"), (Int4Verifier, "gptq")]
)
def test_broken_activations_name_the_layer(verifier: type, method: str, calibration: Calibration) -> None:
    model = fresh()
    with torch.no_grad():
        model.blocks[2].mlp_norm.weight[3] = torch.inf
    with pytest.raises(QuasarError, match=r"blocks\.2\.mlp\.gate_up: its input on calibration text"):
        verifier(model, Setup(calibration=lambda: calibration), method=method)


def test_pack_int4_round_trip() -> None:
    values = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    assert torch.equal(reference.unpack_int4(reference.pack_int4(values)), values)


@pytest.mark.parametrize("rows", [1, 3, 8, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_w8a8_equals_its_reference(rows: int, dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator).to(dtype)
    weight = quantize_int8(torch.randn(64, 96, generator=generator))
    offset = torch.randn(64, generator=generator).to(dtype) if bias else None
    expected = definitions.linear_w8a8(*definitions.quantized(x), dtype, weight.values, weight.scales, offset)
    assert torch.equal(quasar_kernels.linear_w8a8(x, weight, offset), expected)


@pytest.mark.parametrize("rows", [1, 3, 8, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_linear_w4a16_equals_its_reference(rows: int, dtype: torch.dtype, symmetric: bool, group_size: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 192, generator=generator).to(dtype)
    dense = torch.randn(64, 192, generator=generator)
    grid = grid_int4(dense, group_size, symmetric)
    packed = reference.pack_int4(round_int4(dense, grid))
    weight = Int4Weight(packed, grid.scales, grid.zeros, symmetric, dtype)
    expected = definitions.linear_int4(x, weight.packed, weight.scales, weight.zeros)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    error = (quasar_kernels.linear_w4a16(x, weight) - expected).abs().max() / expected.abs().max()
    assert error < tolerance


def test_quantize_tokens_rounds_each_row_on_its_own() -> None:
    x = torch.randn(7, 64)
    values, scales = reference.quantize_tokens(x)
    for row in range(7):
        alone, scale = reference.quantize_tokens(x[row : row + 1])
        assert torch.equal(alone[0], values[row])
        assert torch.equal(scale[0], scales[row])
    assert values.abs().amax(1).tolist() == [127] * 7
    assert reference.quantize_tokens(torch.zeros(1, 8))[0].abs().sum() == 0


def test_quantize_tokens_by_group_rounds_each_group_on_its_own() -> None:
    x = torch.randn(7, 64) * torch.tensor([1.0, 100.0]).repeat_interleave(32)
    values, scales = reference.quantize_tokens(x, 32)
    for group in range(2):
        part = slice(32 * group, 32 * group + 32)
        alone, scale = reference.quantize_tokens(x[:, part])
        assert torch.equal(alone, values[:, part])
        assert torch.equal(scale[:, 0], scales[:, group])
    assert (values[:, :32].float() * scales[:, :1] - x[:, :32]).abs().max() < 0.02


def test_outliers_of_one_group_spare_the_others() -> None:
    """With one scale per token an outlier channel would round the other groups' activations to nothing."""
    x = torch.randn(5, 256)
    x[:, 3] = 3000.0
    weight = Int4Weight(
        torch.randint(0, 256, (32, 128), dtype=torch.uint8), torch.rand(32, 4) + 0.1, torch.full((32, 4), 8.0), True
    )
    scales = weight.scales.clone()
    scales[:, 0] = 0.0  # look at the other groups alone
    expected = definitions.linear_int4(x, weight.packed, scales, weight.zeros)
    muted = weight.packed, scales, weight.zeros
    error = (definitions.linear_w4a8(*definitions.quantized(x, 64), x.dtype, muted) - expected).abs().max()
    assert error < 0.02 * expected.abs().max()


def test_verifiers_quantize_the_blocks_alone(tiny: Transformer) -> None:
    dense = {name: parameter.clone() for name, parameter in tiny.named_parameters()}
    before = FP16Verifier(tiny, Setup()).cost.weight_bytes
    verifier = Int8Verifier(tiny, Setup(), method="rtn")
    assert torch.equal(verifier.model.lm_head.weight, dense["lm_head.weight"])
    assert torch.equal(verifier.model.embedding.weight, dense["embedding.weight"])
    linears = [module for module in verifier.model.blocks.modules() if isinstance(module, nn.Linear)]
    assert not linears
    block = sum(value.numel() for name, value in dense.items() if value.dim() == 2 and name.startswith("blocks"))
    head = dense["lm_head.weight"].nbytes
    assert before > 4 * block + head  # float32, and the norms
    assert block + head < verifier.cost.weight_bytes < 1.2 * block + head


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_weight_bytes(symmetric: bool) -> None:
    dense = torch.randn(64, 128)
    grid = grid_int4(dense, 32, symmetric)
    packed = reference.pack_int4(round_int4(dense, grid))
    groups = 64 * 4
    weight = Int4Weight(packed, grid.scales, grid.zeros, symmetric, torch.bfloat16)
    assert weight.nbytes == 64 * 128 / 2 + 2 * groups + (0 if symmetric else groups / 2)


def test_group_size_that_does_not_divide_is_refused(tiny: Transformer) -> None:
    with pytest.raises(RequestError, match=r"group_size=96 does not divide 128, the input width of blocks\.0\."):
        Int4Verifier(tiny, Setup(), method="rtn", group_size=96)


def test_eight_bit_activations_reach_the_kernel(tiny: Transformer) -> None:
    verifier = Int4Verifier(tiny, Setup(), method="rtn", activation_bits=8)
    layer = verifier.model.blocks[0].mlp.down
    x = torch.randn(3, 256)
    weight = layer.weight
    quantized = definitions.quantized(x, weight.group_size)
    assert torch.equal(layer(x), definitions.linear_w4a8(*quantized, x.dtype, weight.canonical()))


@pytest.mark.parametrize("verifier", [Int8Verifier, Int4Verifier])
def test_an_8_bit_head_keeps_the_tied_embedding(verifier: type) -> None:
    model = fresh()
    model.lm_head.weight = model.embedding.weight
    table = model.embedding.weight.clone()
    quantized = verifier(model, Setup(), method="rtn", lm_head_bits=8).model
    assert isinstance(quantized.lm_head, W8A16Linear)
    assert torch.equal(quantized.embedding.weight, table)
    x = torch.randn(2, 128)
    assert torch.allclose(quantized.lm_head(x), x @ table.T, atol=0.5)


def test_bitsandbytes_nf4_is_the_nearest_quantile() -> None:
    """The 16 levels of NF4 as the QLoRA paper's appendix E lists them, scaled by each block's largest magnitude."""
    levels = torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(
                0.24611230194568634,
                0.33791524171829224,
                0.44070982933044434,
                0.5626170039176941,
                0.7229568362236023,
                1.0,
            ),
        ]
    )
    dense = fresh().blocks[0].mlp.down.weight
    blocks = dense.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)
    expected = (levels[nearest] * largest).view_as(dense)
    verifier = Bnb4BitVerifier(fresh(), Setup())
    x = torch.randn(3, 256)
    assert torch.allclose(verifier.model.blocks[0].mlp.down(x), x @ expected.T, atol=1e-4)
    assert verifier.cost.weight_bytes < FP16Verifier(fresh(), Setup()).cost.weight_bytes / 4


def test_bitsandbytes_int8_is_our_w8a8_rounding() -> None:
    """It computes scales in float16, so that an integer may differ by one."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).half().float()
    ours = Int8Verifier(fresh(), Setup(), method="rtn").model.blocks[0].mlp.down.weight
    layer = BnbInt8Verifier(fresh(), Setup()).model.blocks[0].mlp.down
    found = layer(x)
    values, largest = layer.state.CB, layer.state.SCB
    assert (values.int() - ours.values).abs().max() <= 1
    assert torch.allclose(largest / 127, ours.scales, rtol=1e-3)
    # On a CPU it does not quantize the activations.
    assert torch.allclose(found, x @ (values * (largest / 127).unsqueeze(1)).T, atol=1e-5)
