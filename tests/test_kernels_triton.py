"""The Triton kernels against `tests.definitions`: on the GPU if there is one, else in Triton's interpreter; and
compiled ahead of time for GPUs that this machine need not have."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Imported after the check that Triton is there; tests/conftest.py has chosen the interpreter if there is no GPU.
from quasar_kernels import AttentionOptions, GroupNumbers, Int4Weight, QuantizedSlots, reference
from quasar_kernels.ops.add_rms_norm import OP as NORM
from quasar_kernels.ops.add_rms_norm import QUANTIZING as NORM_QUANTIZE
from quasar_kernels.ops.add_scaled import OP as ADD_SCALED
from quasar_kernels.ops.block_attention import OP as BLOCK_ATTENTION
from quasar_kernels.ops.gelu_mul import OP as GELU
from quasar_kernels.ops.gelu_mul import QUANTIZING as GELU_QUANTIZE
from quasar_kernels.ops.rotary_write import OP as ROTARY_WRITE
from quasar_kernels.ops.silu_mul import OP as SILU
from quasar_kernels.ops.silu_mul import QUANTIZING as SILU_QUANTIZE
from quasar_kernels.triton import linear_bf16, linear_fp8, linear_w4, linear_w8a8, tuning
from quasar_kernels.triton.activation import gelu_mul, gelu_mul_quantize, silu_mul, silu_mul_quantize
from quasar_kernels.triton.attention import block_attention
from quasar_kernels.triton.int4_packing import pack_int4
from quasar_kernels.triton.linear_w8_groups import PackedGroupInt8, TransposedNumbers, linear_w8_groups
from quasar_kernels.triton.norm import add_rms_norm, add_rms_norm_quantize, add_scaled
from quasar_kernels.triton.quantize import quantize_tokens, quantize_tokens_fp8
from quasar_kernels.triton.rotary import rotary_write
from quasar_kernels.triton.tuning import Shape, Tiling

from tests import definitions
from tests.selection import always, fast

# The interpreter truncates where the GPU rounds to the nearest bfloat16, once or twice in an op.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN or 99, so that an element that a kernel leaves out is seen."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        return out.fill_(torch.nan if out.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def normal(generator: torch.Generator, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of the dtype, relative to the largest value of a row."""
    assert actual.dtype == expected.dtype
    scale = expected.float().abs().amax(-1, keepdim=True).clamp_min(1e-6)
    difference = (actual.float() - expected.float()).abs() / scale
    assert difference.max().item() <= TOLERANCE[expected.dtype], difference.max().item()


def assert_quantized_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Integers of float32 values at most one step apart (a tie), of 16-bit values as far as their rounding makes."""
    steps = (actual[0].int() - expected[0].int()).abs().max().item()
    assert steps <= max(1, round(127 * TOLERANCE[dtype]))
    # The interpreter truncates values to 16 bit, twice on the way to the largest of a group.
    torch.testing.assert_close(actual[1], expected[1], rtol=2 * TOLERANCE[dtype], atol=0)


def int8_weight(generator: torch.Generator, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    values = torch.randint(-127, 128, (outputs, inputs), generator=generator, device=DEVICE, dtype=torch.int8)
    return values, torch.rand(outputs, generator=generator, device=DEVICE) + 0.1


def int4_weight(
    generator: torch.Generator, outputs: int, inputs: int, group_size: int, zeros: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical form; scales that float16 holds, so that packing rounds none."""
    groups = (outputs, inputs // group_size)
    packed = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, device=DEVICE, dtype=torch.uint8)
    scales = (torch.rand(groups, generator=generator, device=DEVICE) + 0.1).half().float() / 64
    if zeros == "symmetric":
        return packed, scales, torch.full(groups, 8.0, device=DEVICE)
    offsets = torch.randint(0, 16, groups, generator=generator, device=DEVICE).float()
    return packed, scales, offsets + (0.25 if zeros == "fractional" else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tiling"),
    [
        (1, 40, 256, Tiling(16, 32, 128)),
        (6, 64, 576, Tiling(16, 32, 256)),  # K ends inside a block
        (17, 33, 192, Tiling(16, 16, 64, split_k=2)),  # N and M end inside a block, 3 iterations for 2 splits
        (33, 96, 512, Tiling(32, 32, 64, split_k=4)),
    ],
)
def test_w8a8_is_exact(
    generator: torch.Generator, rows: int, outputs: int, inputs: int, tiling: Tiling, dtype: torch.dtype
) -> None:
    x = normal(generator, rows, inputs, dtype=dtype)
    values, scales = int8_weight(generator, outputs, inputs)
    bias = normal(generator, outputs, dtype=dtype) if rows > 1 else None
    tokens, token_scales = reference.quantize_tokens(x)
    actual = linear_w8a8.linear_w8a8(tokens, token_scales, values, scales, bias, dtype, tiling)
    expected = definitions.linear_w8a8(tokens, token_scales, dtype, values, scales, bias)
    if dtype == torch.float32 and DEVICE.type == "cpu":
        assert torch.equal(actual, expected)
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tiling"),
    [
        (1, 40, 256, Tiling(16, 32, 128)),
        (6, 64, 576, Tiling(16, 32, 256)),  # K ends inside a block
        (17, 33, 192, Tiling(16, 16, 64, split_k=2)),  # N and M end inside a block, 3 iterations for 2 splits
    ],
)
def test_fp8(
    generator: torch.Generator, rows: int, outputs: int, inputs: int, tiling: Tiling, dtype: torch.dtype
) -> None:
    x = normal(generator, rows, inputs, dtype=dtype)
    values, scales = reference.quantize_tokens_fp8(normal(generator, outputs, inputs))
    bias = normal(generator, outputs, dtype=dtype) if rows > 1 else None
    tokens, token_scales = quantize_tokens_fp8(x)
    expected_tokens, expected_scales = reference.quantize_tokens_fp8(x)
    found, wanted = tokens.float(), expected_tokens.float()
    if DEVICE.type == "cpu":
        # The interpreter loses the carry of a number that is rounded up to a power of two, and rounds ties up.
        exact = x.float() / expected_scales
        carried = (wanted.abs() > exact.abs()) & (wanted.frexp().mantissa.abs() == 0.5)
        other = 2 * exact - wanted
        tied = (other != wanted) & (other.to(torch.float8_e4m3fn).float() == other)
        assert (carried | tied).float().mean() < 0.2
        found = torch.where(carried | tied, wanted, found)
    assert torch.equal(found, wanted)
    assert torch.equal(token_scales, expected_scales)
    actual = linear_fp8.linear_fp8(tokens, token_scales, values, scales.squeeze(1), bias, dtype, tiling)
    restored = tokens.double() * token_scales.double()
    expected = definitions.linear(restored, values.double() * scales.double(), bias).to(dtype)
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group_size", "tiling"),
    [
        (1, 32, 128, 64, Tiling(16, 32, 64)),
        (5, 48, 576, 64, Tiling(16, 32, 64, split_k=2)),
        (17, 96, 512, 32, Tiling(32, 32, 128, split_k=4)),
        (33, 64, 768, 128, Tiling(64, 32, 256)),
    ],
)
def test_w8a8_in_groups(
    generator: torch.Generator,
    rows: int,
    outputs: int,
    inputs: int,
    group_size: int,
    tiling: Tiling,
    dtype: torch.dtype,
) -> None:
    x = normal(generator, rows, inputs, dtype=dtype)
    values, scales = int8_weight(generator, outputs, inputs)
    bias = normal(generator, outputs, dtype=dtype)
    tokens, token_scales = reference.quantize_tokens(x, group_size)
    actual = linear_w8a8.linear_w8a8(tokens, token_scales, values, scales, bias, dtype, tiling)
    expected = definitions.linear_w8a8(tokens, token_scales, dtype, values, scales, bias)
    assert_close(actual, expected)
    if dtype == torch.float32 and DEVICE.type == "cpu" and tiling.split_k == 1:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("rows", fast(range(1, 34), *range(1, 10), 16, 17, 32, 33))
def test_every_number_of_rows(generator: torch.Generator, rows: int) -> None:
    values, scales = int8_weight(generator, 32, 128)
    weight = int4_weight(generator, 32, 128, 64, "symmetric")
    x, dense = normal(generator, rows, 128), normal(generator, 32, 128)
    tokens, token_scales = reference.quantize_tokens(x)
    tiling = Tiling(Shape("linear_w8a8", rows, 32, 128).block_m, 32, 128)
    actual = linear_w8a8.linear_w8a8(tokens, token_scales, values, scales, None, x.dtype, tiling)
    assert_close(actual, definitions.linear_w8a8(tokens, token_scales, x.dtype, values, scales))
    packed = pack_int4(*weight)
    assert_close(linear_w4.linear_w4a16(x, packed, None, tiling), definitions.linear_int4(x, *weight))
    by_group = reference.quantize_tokens(x, 64)
    actual = linear_w4.linear_w4a8(*by_group, packed, None, x.dtype, tiling)
    assert_close(actual, definitions.linear_w4a8(*by_group, x.dtype, weight))
    assert_close(linear_bf16.linear_bf16(x, dense, None, tiling), definitions.linear(x, dense))
    actual = linear_bf16.linear_bf16(x, values, None, tiling, scales)
    assert_close(actual, definitions.linear_int8(x, values, scales))
    assert_close(add_rms_norm(x, dense[0], 1e-5, x)[0], definitions.rms_norm(x + x, dense[0], 1e-5).to(x.dtype))
    assert_close(silu_mul(x), definitions.silu_mul(x).to(x.dtype))
    assert torch.equal(quantize_tokens(x)[0], tokens)
    assert torch.equal(quantize_tokens(x, 64)[0], by_group[0])


@pytest.mark.parametrize("rows", fast(range(1, 34), *range(1, 10), 16, 17, 32, 33))
def test_attention_of_every_number_of_rows(generator: torch.Generator, rows: int) -> None:
    """Contexts that end before, at and behind the end of a tile of slots."""
    start = torch.tensor([60 + rows % 9], device=DEVICE)
    cache = normal(generator, 2, 1, 110, 16)
    cos, sin = normal(generator, rows, 16), normal(generator, rows, 16)
    qkv = normal(generator, rows, 5 * 16)
    expected_cache = cache.clone()
    q = rotary_write(qkv, cos, sin, cache[0], cache[1], start)
    assert_close(q, ROTARY_WRITE.plain(qkv, cos, sin, *expected_cache, start))
    assert_close(cache, expected_cache)
    mask = torch.ones(rows, rows, dtype=torch.bool, device=DEVICE).tril()
    assert_close(
        block_attention(q, cache[0], cache[1], start, mask, splits=2), BLOCK_ATTENTION.plain(q, *cache, start, mask)
    )


@pytest.mark.parametrize("zeros", ["symmetric", "integer", "fractional"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group_size", "tiling"),
    [
        (1, 40, 256, 32, Tiling(16, 32, 128)),
        (5, 64, 384, 64, Tiling(16, 32, 64, split_k=4)),  # 6 groups for 4 splits, one of which gets none
        (33, 48, 512, 128, Tiling(16, 64, 128, split_k=2)),
    ],
)
def test_w4a16(
    generator: torch.Generator,
    rows: int,
    outputs: int,
    inputs: int,
    group_size: int,
    tiling: Tiling,
    dtype: torch.dtype,
    zeros: str,
) -> None:
    x = normal(generator, rows, inputs, dtype=dtype) + 0.5
    weight = int4_weight(generator, outputs, inputs, group_size, zeros)
    bias = normal(generator, outputs, dtype=dtype) if rows > 1 else None
    assert_close(linear_w4.linear_w4a16(x, pack_int4(*weight), bias, tiling), definitions.linear_int4(x, *weight, bias))


@pytest.mark.parametrize("zeros", ["symmetric", "integer", "fractional"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "group_size", "split_k"), [(1, 64, 2), (7, 128, 1), (20, 256, 2)])
def test_w4a8(
    generator: torch.Generator, rows: int, group_size: int, split_k: int, dtype: torch.dtype, zeros: str
) -> None:
    x = normal(generator, rows, 512, dtype=dtype) + 0.5
    weight = int4_weight(generator, 40, 512, group_size, zeros)
    bias = normal(generator, 40, dtype=dtype)
    tokens, token_scales = reference.quantize_tokens(x, group_size)
    tiling = Tiling(16, 32, group_size, split_k)
    actual = linear_w4.linear_w4a8(tokens, token_scales, pack_int4(*weight), bias, dtype, tiling)
    assert_close(actual, definitions.linear_w4a8(tokens, token_scales, dtype, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tiling"),
    [(1, 40, 192, Tiling(16, 32, 128)), (18, 64, 256, Tiling(16, 32, 64, split_k=2))],
)
def test_unquantized(
    generator: torch.Generator, rows: int, outputs: int, inputs: int, tiling: Tiling, dtype: torch.dtype
) -> None:
    x, weight = normal(generator, rows, inputs, dtype=dtype), normal(generator, outputs, inputs, dtype=dtype)
    bias = normal(generator, outputs, dtype=dtype)
    expected = (x.double() @ weight.double().T + bias.double()).to(dtype)
    assert_close(linear_bf16.linear_bf16(x, weight, bias, tiling), expected)


@pytest.mark.parametrize("dtype", fast(DTYPES, torch.bfloat16))
@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "group_size", "shared", "tiling"),
    [
        (1, 40, 16, 16, Tiling(16, 32, 64)),
        (5, 64, 32, 8, Tiling(16, 32, 64, split_k=4)),
        (33, 33, 32, 1, Tiling(16, 16, 128, split_k=2)),
        (18, 48, 128, 0, Tiling(32, 32, 128)),
    ],
)
def test_w8a16_in_groups(
    generator: torch.Generator,
    rows: int,
    outputs: int,
    group_size: int,
    shared: int,
    tiling: Tiling,
    minimums: bool,
    dtype: torch.dtype,
) -> None:
    """shared: the number of groups with a float16 number, which has factors; 0 without factors."""

    def numbers() -> GroupNumbers:
        values = normal(generator, outputs, groups // (shared or 1), dtype=torch.float16) / 64
        size = outputs, groups
        factors = torch.randint(-128, 128, size, generator=generator, device=DEVICE, dtype=torch.int8)
        return GroupNumbers(values, factors if shared else None)

    inputs = 512
    groups = inputs // group_size
    x, bias = normal(generator, rows, inputs, dtype=dtype) + 0.5, normal(generator, outputs, dtype=dtype)
    values, _ = int8_weight(generator, outputs, inputs)
    scales, lowest = numbers(), numbers() if minimums else None
    packed = PackedGroupInt8(
        values, TransposedNumbers.of(scales), None if lowest is None else TransposedNumbers.of(lowest), group_size
    )
    matrix = definitions.dequantized_groups(values, scales.expanded(), None if lowest is None else lowest.expanded())
    assert_close(linear_w8_groups(x, packed, bias, tiling), definitions.linear(x, matrix, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a16_with_scales_that_float16_does_not_hold(generator: torch.Generator, dtype: torch.dtype) -> None:
    """A scale of Q4_K has 17 bits, and its minimum becomes a fractional zero point."""
    packed, _, _ = int4_weight(generator, 40, 256, 32, "symmetric")
    scales, zeros = (normal(generator, 40, 8).abs() + 0.1 for _ in range(2))
    weight = pack_int4(packed, scales, zeros * 16)
    assert weight.zeros is not None
    assert weight.scales.dtype == weight.zeros.dtype == torch.float32
    x = normal(generator, 5, 256, dtype=dtype)
    actual = linear_w4.linear_w4a16(x, weight, None, Tiling(16, 32, 64))
    assert_close(actual, definitions.linear_int4(x, packed, scales, zeros * 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tiling"),
    [(1, 40, 192, Tiling(16, 32, 128)), (18, 64, 256, Tiling(16, 32, 64, split_k=2))],
)
def test_w8a16(
    generator: torch.Generator, rows: int, outputs: int, inputs: int, tiling: Tiling, dtype: torch.dtype
) -> None:
    x, bias = normal(generator, rows, inputs, dtype=dtype), normal(generator, outputs, dtype=dtype)
    values, scales = int8_weight(generator, outputs, inputs)
    expected = definitions.linear_int8(x, values, scales, bias)
    assert_close(linear_bf16.linear_bf16(x, values, bias, tiling, scales), expected)


def test_split_counters_return_to_zero(generator: torch.Generator) -> None:
    """A second launch on the same counters gives the same result."""
    x, weight = normal(generator, 3, 256), normal(generator, 64, 256)
    first, second = (linear_bf16.linear_bf16(x, weight, None, Tiling(16, 32, 64, split_k=4)) for _ in range(2))
    assert torch.equal(first, second)


def test_packing_can_be_undone(generator: torch.Generator) -> None:
    for outputs, group_size in ((40, 64), (48, 32)):
        packed, scales, zeros = int4_weight(generator, outputs, 128, group_size, "integer")
        assert torch.equal(pack_int4(packed, scales, zeros).canonical(), packed)


def test_a_weight_holds_its_integers_once(generator: torch.Generator) -> None:
    canonical = int4_weight(generator, 48, 128, 64, "fractional")
    weight = Int4Weight(*canonical, symmetric=False, dtype=torch.float32)
    first = weight.packed_for_triton()
    assert weight.packed_for_triton() is first
    held = [value for value in vars(weight).values() if isinstance(value, Tensor)]
    assert not [part for part in [*held, *(weight._canonical or ())] if part.dtype == torch.uint8]
    assert all(torch.equal(*pair) for pair in zip(weight.canonical(), canonical, strict=True))


def test_packing_pads_the_outputs_and_keeps_every_weight(generator: torch.Generator) -> None:
    packed, scales, zeros = int4_weight(generator, 40, 128, 64, "integer")
    weight = pack_int4(packed, scales, zeros)
    assert weight.values.shape == (3, 2, 16, 32)
    output, group, element = 37, 1, 50
    stored = weight.values[output // 16, group, output % 16, element - 32] >> 4
    assert int(stored) ^ 8 == int(definitions.int4_values(packed)[output, group * 64 + element])
    assert weight.scales[group, output] * weight.unit == scales[output, group]
    assert weight.nbytes == 48 * 64 + 40 * 2 * 2 + 40 * 2


@pytest.mark.parametrize("dtype", fast(DTYPES, torch.bfloat16))
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 100), (33, 576)])
def test_norm_activation_and_quantization(
    generator: torch.Generator, rows: int, width: int, dtype: torch.dtype
) -> None:
    x, residual = normal(generator, rows, width, dtype=dtype), normal(generator, rows, width, dtype=dtype)
    x[0] = 0
    weight = normal(generator, width, dtype=dtype)
    for added in (None, residual):
        expected = NORM.plain(x, weight, 1e-5, added)
        for actual, wanted in zip(add_rms_norm(x, weight, 1e-5, added), expected, strict=True):
            assert_close(actual, wanted)
        quantized = add_rms_norm_quantize(x, weight, 1e-5, added)
        assert_quantized_close(quantized, NORM_QUANTIZE.plain(x, weight, 1e-5, added), dtype)
        assert_close(quantized[2], expected[1])
    gate_up = torch.cat([x, residual], dim=1)
    for added in (None, residual):
        actual = add_rms_norm(x, weight, 1e-5, added, one_plus=True)[0]
        assert_close(actual, NORM.plain(x, weight, 1e-5, added, True)[0])
    assert_close(silu_mul(gate_up), SILU.plain(gate_up))
    assert_quantized_close(silu_mul_quantize(gate_up), SILU_QUANTIZE.plain(gate_up), dtype)
    assert_close(gelu_mul(gate_up), GELU.plain(gate_up))
    assert_quantized_close(gelu_mul_quantize(gate_up), GELU_QUANTIZE.plain(gate_up), dtype)
    assert_close(add_scaled(x, residual, 0.22), ADD_SCALED.plain(x, residual, 0.22))
    for size in (None, 4):
        for actual, wanted in zip(quantize_tokens(x, size), reference.quantize_tokens(x, size), strict=True):
            assert torch.equal(actual, wanted)
        quantized = add_rms_norm_quantize(x, weight, 1e-5, residual, group_size=size)
        assert_quantized_close(quantized, NORM_QUANTIZE.plain(x, weight, 1e-5, residual, False, size), dtype)
        assert_quantized_close(silu_mul_quantize(gate_up, size), SILU_QUANTIZE.plain(gate_up, size), dtype)


def test_quantization_rounds_ties_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0, 126.5]], device=DEVICE)
    assert quantize_tokens(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, 0, 126]]


@pytest.mark.parametrize("dtype", fast(DTYPES, torch.bfloat16))
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "context", "splits"),
    [
        (1, 4, 2, 32, 0, 3),  # no context: two of the splits are empty
        (5, 6, 2, 64, 70, 2),
        (9, 8, 1, 40, 200, 4),  # a head dimension that is no power of two, more packed rows than a tile
        (33, 4, 2, 32, 3, 2),
    ],
)
def test_rotary_and_attention(
    generator: torch.Generator,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    splits: int,
    dtype: torch.dtype,
) -> None:
    qkv = normal(generator, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos, sin = normal(generator, rows, head_dim), normal(generator, rows, head_dim)
    norms = (normal(generator, head_dim, dtype=dtype), normal(generator, head_dim, dtype=dtype))
    start = torch.tensor([context], device=DEVICE)
    cache = normal(generator, 2, kv_heads, context + rows + 5, head_dim, dtype=dtype)
    expected_cache = cache.clone()
    whole = (normal(generator, heads * head_dim, dtype=dtype), normal(generator, kv_heads * head_dim, dtype=dtype))
    for q_norm, k_norm, one_plus in ((None, None, False), (*norms, False), (*norms, True), (*whole, False)):
        q = rotary_write(qkv, cos, sin, cache[0], cache[1], start, q_norm, k_norm, 1e-6, one_plus)
        expected = ROTARY_WRITE.plain(qkv, cos, sin, *expected_cache, start, q_norm, k_norm, 1e-6, one_plus)
        # Rotation mixes values of a whole head, and truncation before it counts double.
        assert (q.float() - expected.float()).abs().max() <= 4 * TOLERANCE[dtype] * expected.float().abs().max()
        assert (cache.float() - expected_cache.float()).abs().max() <= 4 * TOLERANCE[dtype] * expected_cache.abs().max()
        outside = torch.ones(cache.shape[2], dtype=torch.bool, device=DEVICE)
        outside[context : context + rows] = False
        assert torch.equal(cache[:, :, outside], expected_cache[:, :, outside])
    mask = torch.rand(rows, rows, generator=generator, device=DEVICE) > 0.5
    mask.fill_diagonal_(True)
    attended = block_attention(expected, *expected_cache, start, mask, splits=splits)
    assert_close(attended, BLOCK_ATTENTION.plain(expected, *expected_cache, start, mask))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", fast([torch.float16, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "context"),
    [(1, 4, 2, 32, 0), (5, 6, 2, 64, 70), (3, 4, 1, 96, 63), (9, 8, 1, 40, 200)],  # 96 and 40 are no powers of two
)
def test_quantized_slots(
    generator: torch.Generator,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    dtype: torch.dtype,
    bits: int,
) -> None:
    qkv = normal(generator, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos, sin = normal(generator, rows, head_dim), normal(generator, rows, head_dim)
    norms = (normal(generator, head_dim, dtype=dtype), normal(generator, head_dim, dtype=dtype))
    whole = tuple(normal(generator, count * head_dim, dtype=dtype) for count in (heads, kv_heads))
    start = torch.tensor([context], device=DEVICE)
    cache = quantized_cache(generator, (2, kv_heads, context + rows + 5, head_dim), bits)
    expected_cache = [QuantizedSlots(part.codes.clone(), part.scales.clone()) for part in cache]
    for q_norm, k_norm, one_plus in ((None, None, False), (*norms, False), (*norms, True), (*whole, False)):
        q = rotary_write(qkv, cos, sin, *cache, start, q_norm, k_norm, 1e-6, one_plus)
        expected = ROTARY_WRITE.plain(qkv, cos, sin, *expected_cache, start, q_norm, k_norm, 1e-6, one_plus)
        assert (q.float() - expected.float()).abs().max() <= 4 * TOLERANCE[dtype] * expected.float().abs().max()
        for kind, found, wanted in zip("kv", cache, expected_cache, strict=True):
            if kind == "v" or (dtype == torch.float16 and q_norm is None):
                # Nothing is rounded in the interpreter before the quantization: the codes are those of the reference.
                assert torch.equal(found.codes, wanted.codes)
                assert torch.equal(found.scales, wanted.scales)
            error = (found.dequantized(torch.float32) - wanted.dequantized(torch.float32)).abs()
            step = wanted.dequantized(torch.float32).abs().max() * (
                4 * TOLERANCE[dtype] + (2 / 15 if bits == 4 else 1 / 127)
            )
            assert error.max() <= step
    mask = torch.rand(rows, rows, generator=generator, device=DEVICE) > 0.5
    mask.fill_diagonal_(True)
    queries = normal(generator, rows, heads, head_dim, dtype=dtype)
    filled = quantized_cache(generator, (2, kv_heads, context + rows + 5, head_dim), bits)
    attended = block_attention(queries, *filled, start, mask, splits=3).float()
    wanted = BLOCK_ATTENTION.plain(queries, *(part.dequantized(dtype) for part in filled), start, mask).float()
    # The interpreter truncates the dequantized values too.
    error = (attended - wanted).abs() / wanted.abs().amax(-1, keepdim=True)
    assert error.max() <= 2 * TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with NumPy
@pytest.mark.parametrize("bits", [8, 4])
def test_a_nan_is_not_lost_in_a_quantized_slot(generator: torch.Generator, bits: int) -> None:
    head_dim = 32
    cos, sin = torch.ones(1, head_dim, device=DEVICE), torch.zeros(1, head_dim, device=DEVICE)
    start = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for place in (head_dim, 2 * head_dim):  # the first element of the key, and of the value
        qkv = normal(generator, 1, 3 * head_dim)
        qkv[0, place] = torch.nan
        cache = quantized_cache(generator, (2, 1, 4, head_dim), bits)
        rotary_write(qkv, cos, sin, *cache, start)
        broken = [bool(part.dequantized(torch.float32)[0, 0].isnan().any()) for part in cache]
        assert broken == [place == head_dim, place == 2 * head_dim]


def quantized_cache(generator: torch.Generator, shape: tuple[int, ...], bits: int) -> list[QuantizedSlots]:
    """Keys and values with random content in every slot."""
    return [QuantizedSlots(*reference.quantize_slots(part, bits)) for part in normal(generator, *shape)]


@pytest.mark.parametrize(
    "options",
    [AttentionOptions(window=64), AttentionOptions(window=90, softcap=3.0), AttentionOptions(softcap=1.0, scale=0.4)],
    ids=str,
)
@pytest.mark.parametrize("context", [0, 70, 300])
def test_attention_with_window_softcap_and_scale(
    generator: torch.Generator, context: int, options: AttentionOptions
) -> None:
    q = normal(generator, 9, 4, 32)
    keys, values = normal(generator, 2, 2, context + 20, 32)
    start = torch.tensor([context], device=DEVICE)
    chain = torch.ones(9, 9, dtype=torch.bool, device=DEVICE).tril()
    tree = definitions.ancestors([-1, 0, 0, 1, 2, 2, 5, 4, 3]).to(DEVICE)
    for mask in (chain, tree, tree.long()):
        found = block_attention(q, keys, values, start, mask, options, splits=3)
        assert_close(found, definitions.block_attention(q, keys, values, context, mask, options).to(q.dtype))


def test_a_window_shorter_than_a_block_is_left_to_pytorch(generator: torch.Generator) -> None:
    q, cache = (normal(generator, *size, dtype=torch.bfloat16) for size in ((3, 2, 32), (2, 1, 40, 32)))
    start, mask = torch.tensor([9], device=DEVICE), torch.ones(3, 3, dtype=torch.bool, device=DEVICE).tril()
    assert BLOCK_ATTENTION.triton is not None
    for window, taken in ((63, False), (64, True), (None, True)):
        options = AttentionOptions(window=window)
        assert BLOCK_ATTENTION.triton.supports(q, cache[0], cache[1], start, mask, options) == taken


def test_default_tilings_fill_the_gpu() -> None:
    """At the shapes of Qwen3-8B there is a program for three quarters of an H100's multiprocessors and more."""
    for outputs, inputs in ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)):
        for op, group_size in (("linear_w8a8", 0), ("linear_bf16", 0), ("linear_w4a16", 128), ("linear_w4a8", 64)):
            for rows in (1, 6, 17, 33):
                tiling = tuning.default_tiling(Shape(op, rows, outputs, inputs, group_size), processors=132)
                columns, splits, row_blocks = tiling.grid(rows, outputs)
                assert columns * splits * row_blocks >= 99
                assert row_blocks == 1
                assert inputs % tiling.block_k == 0


def test_tuning_remembers_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path))
    tuning._table.cache_clear()
    tuning.tiling_for.cache_clear()
    shape = Shape("linear_w8a8", 6, 4096, 4096)
    default = tuning.tiling_for(shape, DEVICE)
    wanted = tuning.candidates(shape, 132)[2]
    assert wanted != default

    def milliseconds(tiling: Tiling) -> float:
        if tiling.warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if tiling == wanted else 2.0

    assert tuning.tune(shape, DEVICE, milliseconds) == wanted
    same_device = torch.device(DEVICE.type, 0)
    assert tuning.tiling_for(shape, same_device) == wanted
    tuning._table.cache_clear()  # as a new process would begin
    assert tuning.tiling_for(Shape("linear_w8a8", 3, 4096, 4096), DEVICE) == wanted
    assert tuning.tiling_for(Shape("linear_w8a8", 20, 4096, 4096), DEVICE).block_m == 32
    other = Shape("linear_bf16", 1, 256, 256)
    another_process = {other.key: {**dataclasses.asdict(tuning.default_tiling(other, 132)), "stages": 9}}
    file = tuning.cache_file(DEVICE)
    tilings = another_process | json.loads(file.read_text())["tilings"]
    file.write_text(json.dumps({"checksum": tuning._checksum(tilings), "tilings": tilings}))
    tuning.tune(shape, DEVICE, milliseconds)
    tuning._table.cache_clear()
    assert tuning.tiling_for(other, DEVICE).stages == 9
    file.write_text(file.read_text().replace('"stages": 9', '"stages": 8'))
    tuning._table.cache_clear()
    tuning.tiling_for.cache_clear()
    with pytest.warns(RuntimeWarning, match="is damaged .*; default tilings are used"):
        assert tuning.tiling_for(other, DEVICE) == tuning.default_tiling(other, tuning.multiprocessors(DEVICE))
    tuning._table.cache_clear()
    tuning.tiling_for.cache_clear()


@functools.cache
def compiled(architecture: int, *options: str) -> dict[str, Any]:
    """What the compiler made of every kernel, by name; compiled in a separate process, because this one's kernels
    may belong to the interpreter. Option ``candidates``: also what tuning may choose."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.triton_compile", str(architecture), *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that one program may use, by compute capability."""
INT8_PRODUCT = r"mma\.\S*s32\.s8\.s8"
TENSOR_CORES = {
    "w8a8": INT8_PRODUCT,
    "w4a8": INT8_PRODUCT,
    "w4a16 bf16": r"mma\.\S*f32\.bf16\.bf16",
    "w4a16 fp16": r"mma\.\S*f32\.f16\.f16",
    "w8a16": r"mma\.\S*f32\.bf16\.bf16",
    "w8a16 in groups": r"mma\.\S*f32\.bf16\.bf16",
    "bf16": r"mma\.\S*f32\.bf16\.bf16",
    "fp8": r"mma\.\S*f32\.(e4m3\.e4m3|f16\.f16)",  # float16 holds every E4M3 number, and sm_90 multiplies it so
    "attention": r"mma\.\S*f32\.bf16\.bf16",
    "attention over codes": r"mma\.\S*f32\.bf16\.bf16",
}
"""The instructions by which each kind of kernel multiplies, as patterns."""
OTHER_KINDS = {"merge", "rotary", "norm", "gates", "add", "quantize"}


@pytest.mark.slow
@pytest.mark.parametrize("options", always([(), ("candidates",)], ()), ids=str)
@pytest.mark.parametrize("architecture", always(SHARED_MEMORY, 90))
def test_every_kernel_compiles_within_registers_and_shared_memory(architecture: int, options: tuple[str, ...]) -> None:
    found = compiled(architecture, *options)
    kinds = (TENSOR_CORES.keys() | OTHER_KINDS) - ({"fp8"} if architecture < 89 else set())
    assert {facts["kind"] for facts in found.values()} == kinds
    spilled = {name: facts["stack_bytes"] for name, facts in found.items() if facts["stack_bytes"]}
    assert not spilled
    large = {name: facts["shared_bytes"] for name, facts in found.items()}
    assert not {name: size for name, size in large.items() if size > SHARED_MEMORY[architecture]}


@pytest.mark.parametrize("options", always([(), ("candidates",)], ()), ids=str)
@pytest.mark.parametrize("architecture", always(SHARED_MEMORY, 90))
def test_products_use_tensor_cores_and_wide_loads(architecture: int, options: tuple[str, ...]) -> None:
    for name, facts in compiled(architecture, *options).items():
        if facts["kind"] in OTHER_KINDS:
            assert not facts["tensor_core_instructions"], name
            continue
        pattern = TENSOR_CORES[facts["kind"]]
        products = facts["tensor_core_instructions"]
        assert any(re.search(pattern, instruction) for instruction in products), (name, products)
        # The weights (and keys) go to shared memory 16 bytes at a time, without passing through registers; only
        # activations, which lie in the cache, may come in smaller pieces.
        # Groups of 16 int8 are too short for that: a thread copies 8 bytes.
        copies = "narrow" if facts["kind"] == "w8a16 in groups" else "wide"
        assert facts[f"{copies}_asynchronous_copies"] >= 3, name
        if facts["kind"] in ("w8a8", "fp8", "bf16", "attention") and "groups" not in name:
            assert facts["narrow_asynchronous_copies"] == 0, name


@pytest.mark.exhaustive
def test_candidates_of_tuning_are_compiled() -> None:
    found = compiled(90, "candidates")
    for kind in ("w8a8", "w8a16", "w4a16 bf16", "w4a8", "bf16", "fp8"):
        assert sum(name.startswith(kind) and "candidate" in name for name in found) >= 8, kind


def test_weights_are_unpacked_in_tensor_core_registers() -> None:
    """Nothing is stored to shared memory inside the loop of up to 32 rows: unpacked weights go straight to the tensor
    cores. (64 rows are multiplied by instructions that read shared memory.)"""
    found = [
        (name, facts)
        for name, facts in compiled(90).items()
        if re.match(r"w4a16 \w+ (6|32) x", name) and "candidate" not in name
    ]
    assert len(found) >= 8
    for name, facts in found:
        assert facts["shared_stores_in_loop"] == 0, name
