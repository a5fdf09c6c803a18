"""Quantizers against hand-made cases and error bounds; kernels' ops against their reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernels
from kernels import Int4Weight, reference
from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.quantization.layers import W4Linear
from quasar.quantization.rounding import quantize_int4, quantize_int8
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier


def test_int8_of_a_hand_made_row() -> None:
    quantized = quantize_int8(torch.tensor([[0.0, 1.27, -0.635, 0.014], [0.0, 0.0, 0.0, 0.0]]))
    assert torch.allclose(quantized.scales, torch.tensor([0.01, 1.0]))
    assert quantized.values.tolist() == [[0, 127, -64, 1], [0, 0, 0, 0]]  # -63.5 rounds to even


def test_int4_of_hand_made_groups() -> None:
    weight = torch.tensor([[0.7, -0.7, 0.1, 0.0, 1.5, 0.0, 0.3, 0.8]])
    values, scales, zeros = quantize_int4(weight, group_size=4, symmetric=True)
    assert values.tolist() == [[15, 1, 9, 8, 15, 8, 9, 12]]
    assert torch.allclose(scales, torch.tensor([[0.1, 1.5 / 7]]))
    assert zeros.tolist() == [[8, 8]]
    values, scales, zeros = quantize_int4(weight, group_size=4, symmetric=False)
    assert torch.allclose(scales, torch.tensor([[1.4 / 15, 0.1]]))
    assert zeros.tolist() == [[8, 0]]  # 7.5 rounds to even
    assert values.tolist() == [[15, 0, 9, 8, 15, 0, 3, 8]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_error_is_half_a_step(symmetric: bool, group_size: int) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    values, scales, zeros = quantize_int4(weight, group_size, symmetric)
    restored = reference.dequantize_int4(reference.pack_int4(values), scales, zeros)
    error = (restored - weight).abs().view(48, -1, group_size)
    # An asymmetric zero point is rounded too, which costs another half step at the range's ends.
    bound = scales.unsqueeze(2) * (0.5 if symmetric else 1.0)
    assert (error <= bound * 1.0001).all()


def test_int4_reproduces_weights_on_its_grid() -> None:
    """Weights that lie on an asymmetric grid in groups of 32 survive: lossless by construction."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (8, 4, 32), generator=generator)
    q[..., 0], q[..., 1] = 0, 15  # every group spans the grid
    scales = torch.rand(8, 4, 1, generator=generator) + 0.1
    weight = ((q - 5) * scales).view(8, 128)
    values, found, zeros = quantize_int4(weight, 32, symmetric=False)
    assert torch.allclose(reference.dequantize_int4(reference.pack_int4(values), found, zeros), weight, atol=1e-5)


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
    expected = reference.linear_w8a8(x, weight.values, weight.scales, offset)
    assert torch.equal(kernels.linear_w8a8(x, weight, offset), expected)


@pytest.mark.parametrize("rows", [1, 3, 8, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_linear_w4a16_equals_its_reference(rows: int, dtype: torch.dtype, symmetric: bool, group_size: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 192, generator=generator).to(dtype)
    values, scales, zeros = quantize_int4(torch.randn(64, 192, generator=generator), group_size, symmetric)
    weight = Int4Weight.prepare(reference.pack_int4(values), scales, zeros, symmetric, dtype)
    expected = reference.linear_w4a16(x, weight.packed, weight.scales, weight.zeros)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    error = (kernels.linear_w4a16(x, weight) - expected).abs().max() / expected.abs().max()
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


def test_verifiers_quantize_the_blocks_alone(tiny: Transformer) -> None:
    dense = {name: parameter.clone() for name, parameter in tiny.named_parameters()}
    before = FP16Verifier(tiny, Setup()).cost.weight_bytes
    verifier = Int8Verifier(tiny, Setup())
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
    layer = W4Linear.from_linear(nn.Linear(128, 64, bias=False), group_size=32, symmetric=symmetric)
    groups = 64 * 4
    assert layer.weight_bytes == 64 * 128 / 2 + 2 * groups + (0 if symmetric else groups / 2)


def test_group_size_that_does_not_divide_is_refused(tiny: Transformer) -> None:
    with pytest.raises(RequestError, match=r"group_size=96 does not divide 128, the input width of blocks\.0\."):
        Int4Verifier(tiny, Setup(), group_size=96)
