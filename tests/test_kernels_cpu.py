"""Every op on a CPU against `tests.definitions`, on every level of processor features that this machine has."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import shutil
from collections.abc import Callable, Iterator

import pytest
import quasar_kernels
import torch
from quasar_kernels import (
    AttentionOptions,
    DenseWeight,
    Fp8Weight,
    GroupInt8Weight,
    GroupNumbers,
    InputOrder,
    Int4Weight,
    Int8Weight,
    Quantized,
    cpu,
)
from quasar_kernels.cpu import library, packing
from quasar_kernels.cpu.levels import available_levels
from quasar_kernels.matmul import Matmul
from quasar_kernels.ops import MATMULS, rotary_write, select_inputs
from quasar_kernels.reference import pack_int4
from quasar_kernels.slots import slot_storage
from torch import Tensor

from tests import definitions

LEVELS = [level.name for level in available_levels()]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 33, 64]
SHAPES = [(32, 32), (96, 160), (224, 576), (64, 1536)]  # outputs, inputs

needs_kernels = pytest.mark.skipif(not LEVELS or shutil.which("g++") is None, reason="no AVX2, or no C++ compiler")


@pytest.fixture(params=[*LEVELS, "torch"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.use_level(request.param)
    with torch.inference_mode():
        yield request.param
    cpu.use_level(None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8_weight(outputs: int, inputs: int) -> Int8Weight:
    generator = torch.Generator().manual_seed(outputs)
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    return Int8Weight(values, torch.rand(outputs, generator=generator) + 0.01)


def int4_weight(
    outputs: int, inputs: int, group_size: int, zeros: str = "symmetric", dtype: torch.dtype = torch.bfloat16
) -> Int4Weight:
    generator = torch.Generator().manual_seed(outputs + group_size)
    shape = outputs, inputs // group_size
    packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(shape, generator=generator) + 0.01
    offsets = {
        "symmetric": torch.full(shape, 8.0),
        "integer": torch.randint(0, 16, shape, generator=generator).float(),
        "fraction": torch.rand(shape, generator=generator) * 15,
    }[zeros]
    return Int4Weight(packed, scales, offsets, zeros == "symmetric", dtype)


def group_numbers(shape: tuple[int, int], shared: int, dtype: torch.dtype, seed: int) -> GroupNumbers:
    """Numbers of the groups [N, G]; ``shared`` groups have one value and different factors."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(shape[0], shape[1] // shared, generator=generator) + 0.1).to(dtype) / 64
    if shared == 1:
        return GroupNumbers(values)
    return GroupNumbers(values, torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator))


def weight_in_blocks(
    bits: int, shape: tuple[int, int], group_size: int, shared: int, minimums: bool, dtype: torch.dtype
) -> tuple[Int4Weight | GroupInt8Weight, Tensor]:
    """A weight as checkpoints store it, and its definition in float64."""
    generator = torch.Generator().manual_seed(bits + group_size)
    groups = shape[0], shape[1] // group_size
    number_dtype = torch.float16 if shared > 1 else torch.float32
    scales = group_numbers(groups, shared, number_dtype, 1)
    lowest = group_numbers(groups, shared, number_dtype, 2) if minimums else None
    low, high = (-128, 128) if bits == 8 else (0, 16)
    values = torch.randint(low, high, shape, generator=generator)
    centered = values - (8 if bits == 4 and not minimums else 0)
    expected = definitions.dequantized_groups(
        centered, scales.expanded(), None if lowest is None else lowest.expanded()
    )
    if bits == 8:
        return GroupInt8Weight(values.to(torch.int8), scales, lowest), expected
    zeros = torch.full(groups, 8.0) if lowest is None else lowest
    return Int4Weight(pack_int4(values.to(torch.uint8)), scales, zeros, lowest is None, dtype), expected


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_w8a8_is_the_reference_bit_for_bit(level: str, dtype: torch.dtype, bias: bool) -> None:
    for outputs, inputs in SHAPES:
        weight = int8_weight(outputs, inputs)
        offset = normal(outputs, dtype=dtype) if bias else None
        values, scales = weight.values, weight.scales
        for rows in ROWS:
            x = normal(rows, inputs, seed=rows, dtype=dtype)
            quantized = Quantized(*definitions.quantized(x), dtype)
            expected = definitions.linear_w8a8(*quantized, values, scales, offset)
            assert torch.equal(quasar_kernels.linear_w8a8(x, weight, offset), expected)
            assert torch.equal(quasar_kernels.linear_w8a8(quantized, weight, offset), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a8_in_groups_is_the_reference_bit_for_bit(level: str, dtype: torch.dtype) -> None:
    for group_size, (outputs, inputs) in [(32, (96, 160)), (64, (64, 576)), (96, (32, 96)), (128, (64, 1536))]:
        values, scales = int8_weight(outputs, inputs).values, torch.rand(outputs) + 0.01
        weight, offset = Int8Weight(values, scales, group_size), normal(outputs)
        assert torch.equal(weight.values, values)
        for rows in (1, 3, 8, 17, 64):
            x = normal(rows, inputs, seed=rows, dtype=dtype)
            quantized = Quantized(*definitions.quantized(x, group_size), dtype)
            expected = definitions.linear_w8a8(*quantized, values, scales, offset)
            assert torch.equal(quasar_kernels.linear_w8a8(x, weight, offset), expected)
            assert torch.equal(quasar_kernels.linear_w8a8(quantized, weight, offset), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a16_is_close_to_the_reference(level: str, dtype: torch.dtype) -> None:
    for outputs, inputs in SHAPES:
        weight = int8_weight(outputs, inputs)
        values, scales, offset = weight.values, weight.scales, normal(outputs, dtype=dtype)
        for rows in ROWS:
            x = normal(rows, inputs, seed=rows, dtype=dtype)
            x[-1] = 0
            error = relative_error(
                quasar_kernels.linear_w8a16(x, weight, offset), definitions.linear_int8(x, values, scales, offset)
            )
            # Activations of 15 bit round by 1 / 32512 of a token's largest value.
            assert error < (1e-4 if dtype == torch.float32 else 1e-2 if level == "torch" else 5e-3)


@needs_kernels
def test_w8a16_takes_activations_of_fifteen_bit(level: str) -> None:
    """Integers up to the largest are exact, where eight bit would leave multiples of 128."""
    if level == "torch":
        pytest.skip("holds for the kernels")
    x = torch.arange(-16256, 16257, 127).float()[:256].repeat(3, 1)
    x[1] *= -1
    x[:, 0] = torch.tensor([16256.0, -16256.0, 16256.0])
    weight = Int8Weight(torch.randint(-127, 128, (32, 256), dtype=torch.int8), torch.ones(32))
    found = quasar_kernels.linear_w8a16(x, weight)
    expected = x.double() @ weight.values.double().T
    assert (found.double() - expected).abs().max() <= expected.abs().max() * 2**-23
    assert (quasar_kernels.linear_w8a8(x, weight).double() - expected).abs().max() > expected.abs().max() * 2**-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", ["symmetric", "integer", "fraction"])
def test_w4a8_is_the_reference_bit_for_bit(level: str, dtype: torch.dtype, zeros: str) -> None:
    for group_size, (outputs, inputs) in [(32, (96, 160)), (64, (64, 576)), (96, (32, 96)), (128, (64, 1536))]:
        weight = int4_weight(outputs, inputs, group_size, zeros, dtype)
        offset = normal(outputs)
        canonical = weight.canonical()
        for rows in (1, 3, 8, 17, 64):
            x = normal(rows, inputs, seed=rows, dtype=dtype)
            quantized = Quantized(*definitions.quantized(x, group_size), dtype)
            expected = definitions.linear_w4a8(*quantized, canonical, offset)
            found = quasar_kernels.linear_w4a8(x, weight, offset)
            if zeros == "fraction":  # group sums that are no integers are rounded in float32, not in float64
                assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-2)
            else:
                assert torch.equal(found, expected)
            assert torch.equal(quasar_kernels.linear_w4a8(quantized, weight, offset), found)


@pytest.mark.parametrize("inputs", [32, 8192])
def test_integer_sums_are_exact_at_their_extremes(level: str, inputs: int) -> None:
    """Scales of one leave the integer sums themselves; the largest products would saturate 16-bit additions."""
    rows = torch.tensor([[127.0], [-127.0]]).repeat(1, inputs)
    values = torch.full((32, inputs), 127, dtype=torch.int8)
    values[1::2] = -127
    found = quasar_kernels.linear_w8a8(rows, Int8Weight(values, torch.ones(32)))
    assert torch.equal(found.double(), rows.double() @ values.double().T)
    packed = torch.full((32, inputs // 2), 0xFF, dtype=torch.uint8)
    packed[1::2] = 0
    groups = 32, inputs // 32
    weight = Int4Weight(packed, torch.ones(groups), torch.full(groups, 8.0), True, torch.float32)
    expected = rows.double() @ (definitions.int4_values(packed) - 8).T
    assert torch.equal(quasar_kernels.linear_w4a8(rows, weight).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", ["symmetric", "integer", "fraction"])
def test_w4a16_is_close_to_the_reference(level: str, dtype: torch.dtype, zeros: str) -> None:
    for group_size, (outputs, inputs) in [(32, (96, 160)), (64, (64, 576)), (128, (32, 1536))]:
        weight = int4_weight(outputs, inputs, group_size, zeros, dtype)
        canonical, offset = weight.canonical(), normal(outputs, dtype=dtype)
        for rows in (1, 3, 8, 17, 64):
            x = normal(rows, inputs, seed=rows, dtype=dtype)
            expected = definitions.linear_int4(x, *canonical, offset)
            error = relative_error(quasar_kernels.linear_w4a16(x, weight, offset), expected)
            assert error < (1e-5 if dtype == torch.float32 else 1.5e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_blocks_keep_their_scales(level: str, bits: int, minimums: bool, dtype: torch.dtype) -> None:
    for group_size, shared, shape in [(16, 16, (96, 512)), (32, 8, (32, 256)), (32, 1, (96, 160)), (96, 1, (64, 192))]:
        weight, exact = weight_in_blocks(bits, shape, group_size, shared, minimums, dtype)
        assert relative_error(weight.dequantize(), exact) < 3e-7  # some roundings in float32
        indices = torch.tensor([5, 0, 31, 5, 17])
        assert torch.equal(weight.rows(indices), weight.dequantize()[indices])
        offset = normal(shape[0], dtype=dtype)
        product = quasar_kernels.linear_w4a16 if bits == 4 else quasar_kernels.linear_w8a16
        for rows in (1, 2, 3, 8, 17, 64):
            x = normal(rows, shape[1], seed=rows, dtype=dtype)
            x[-1, : shape[1] // 2] = 0
            expected = definitions.linear(x, exact, offset)
            # Activations of 15 bit round by 1 / 32512 of the largest value of a group.
            tolerance = 2e-6 if dtype == torch.float32 else 1.5e-2 if level == "torch" else 5e-3
            assert relative_error(product(x, weight, offset), expected) < tolerance
            if bits == 4:
                quantized = Quantized(*definitions.quantized(x, group_size), dtype)
                tokens = quantized.values.double() * quantized.scales.double().repeat_interleave(group_size, dim=1)
                expected = definitions.linear(tokens, exact, offset).to(dtype)
                found = quasar_kernels.linear_w4a8(quantized, weight, offset)
                assert relative_error(found, expected) < (2e-6 if dtype == torch.float32 else 5e-3)


@needs_kernels
def test_weights_in_groups_take_activations_of_fifteen_bit_in_every_group(level: str) -> None:
    """A group of small activations is as exact as one of large ones, which one scale per token would not be."""
    if level == "torch":
        pytest.skip("holds for the kernels")
    x = torch.cat([torch.arange(1, 33).bfloat16() * 2.0**-40, torch.arange(1, 33).bfloat16() * 2.0**40]).repeat(3, 1)
    values = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    scales = torch.tensor([[2.0**40, 2.0**-40]]).repeat(32, 1)
    found = quasar_kernels.linear_w8a16(x, GroupInt8Weight(values, GroupNumbers(scales)))
    expected = definitions.linear(x, definitions.dequantized_groups(values, scales, None))
    assert relative_error(found, expected) < 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_is_close_to_the_reference(level: str, dtype: torch.dtype) -> None:
    for outputs, inputs in SHAPES:
        values, offset = normal(outputs, inputs, dtype=dtype), normal(outputs, dtype=dtype)
        weight = DenseWeight(values)
        for rows in (1, 2, 7, 16, 17, 64, 70):
            x = normal(rows, inputs, seed=rows, dtype=dtype)
            error = relative_error(quasar_kernels.linear_bf16(x, weight, offset), definitions.linear(x, values, offset))
            assert error < (1e-5 if dtype == torch.float32 else 5e-3)


@needs_kernels
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("product", MATMULS, ids=[op.name for op in MATMULS])
def test_a_row_does_not_depend_on_its_block_or_on_threads(level: str, product: Matmul, blocks: bool) -> None:
    if level == "torch":
        pytest.skip("holds for the kernels")
    outputs, inputs = 160, 768
    weight = {
        4: int4_weight(outputs, inputs, 64, "integer"),
        8: int8_weight(outputs, inputs),
        16: DenseWeight(normal(outputs, inputs, dtype=torch.bfloat16)),
    }[product.weight_bits]
    if product.activations == "fp8":
        weight = Fp8Weight.rounded(normal(outputs, inputs))
    if blocks:
        if product.name in ("linear_bf16", "linear_w8a8", "linear_fp8"):
            pytest.skip("takes no weights in blocks")
        weight = weight_in_blocks(product.weight_bits, (outputs, inputs), 32, 8, True, torch.bfloat16)[0]
    x = normal(100, inputs, dtype=torch.bfloat16)
    alone = torch.cat([product(x[row : row + 1], weight) for row in range(len(x))])
    for rows in (*range(1, 33), 47, 64, 65, 100):
        assert torch.equal(product(x[:rows], weight), alone[:rows])
        assert torch.equal(product(x[-rows:], weight), alone[-rows:])
    torch.set_num_threads(2)
    try:
        assert torch.equal(product(x, weight), alone)
    finally:
        torch.set_num_threads(1)


def test_float16_and_strided_activations(level: str) -> None:
    weight, x = int8_weight(64, 96), normal(96, 5).T
    expected = definitions.linear_w8a8(*definitions.quantized(x), x.dtype, weight.values, weight.scales)
    assert torch.equal(quasar_kernels.linear_w8a8(x, weight), expected)
    assert relative_error(quasar_kernels.linear_w8a8(x.half(), weight), expected) < 2e-2
    assert quasar_kernels.linear_w8a8(x.half(), weight).dtype == torch.float16


@needs_kernels
def test_arguments_that_do_not_fit_are_refused() -> None:
    weight = int8_weight(64, 96)
    with pytest.raises(ValueError, match=r"\[M, 96\] on the CPU, got torch.float32 \[3, 64\]"):
        quasar_kernels.linear_w8a8(torch.zeros(3, 64), weight)
    with pytest.raises(ValueError, match=r"expected a bias \[64\]"):
        quasar_kernels.linear_w8a8(torch.zeros(3, 96), weight, torch.zeros(32))
    by_group = Quantized(*definitions.quantized(torch.zeros(3, 96), 32), torch.float32)
    with pytest.raises(ValueError, match=r"scaled int8 \[M, 96\]"):
        quasar_kernels.linear_w8a8(by_group, weight)


def test_packing_keeps_every_value(level: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (64, 96), dtype=torch.int8, generator=generator)
    int8 = Int8Weight(values, torch.ones(64))
    assert (int8.packed_for_cpu is None) == (level == "torch")
    assert torch.equal(int8.values, values)
    nibbles, scales = torch.randint(0, 256, (64, 48), dtype=torch.uint8, generator=generator), torch.full((64, 3), 0.5)
    integers, fractions = (torch.rand(64, 3, generator=generator) * 15 for _ in range(2))
    for zeros in (torch.full((64, 3), 8.0), integers.round(), fractions):
        int4 = Int4Weight(nibbles, scales, zeros, symmetric=bool((zeros == 8).all()))
        assert (int4.packed_for_cpu is None) == (level == "torch")
        assert all(torch.equal(*pair) for pair in zip(int4.canonical(), (nibbles, scales, zeros), strict=True))
    dense = normal(64, 96, dtype=torch.bfloat16)
    weight = DenseWeight(dense)
    assert torch.equal(weight.values, dense)
    rows = torch.tensor([63, 0, 17])
    assert torch.equal(weight.rows(rows), dense[rows])
    assert torch.equal(int8.rows(rows), values[rows].float() * int8.scales[rows].unsqueeze(1))
    for zeros in ("symmetric", "integer", "fraction"):
        int4 = int4_weight(64, 96, 32, zeros)
        assert torch.equal(int4.rows(rows), int4.dequantize()[rows])


def test_norm_and_swiglu(level: str) -> None:
    for rows, size in [(1, 32), (3, 576), (17, 1536), (64, 2048)]:
        x, weight = normal(rows, size, dtype=torch.bfloat16), normal(size, seed=1, dtype=torch.bfloat16)
        shifted, _ = quasar_kernels.add_rms_norm(x, weight, 1e-5, one_plus=True)
        assert relative_error(shifted, definitions.rms_norm(x, weight, 1e-5, one_plus=True)) < 4e-3
        found, _ = quasar_kernels.add_rms_norm(x, weight, 1e-5)
        assert relative_error(found, definitions.rms_norm(x, weight, 1e-5)) < 4e-3
        for group_size in (None, 32):
            values, scales = definitions.quantized(found, group_size)
            quantized = quasar_kernels.add_rms_norm_quantize(x, weight, 1e-5, group_size=group_size)
            assert torch.equal(quantized[0], values)
            assert torch.equal(quantized[1], scales)
            assert torch.equal(quantized[2], x)

        gate_up = normal(rows, 2 * size, dtype=torch.bfloat16) * 8
        for plain, quantizing, definition in (
            (quasar_kernels.silu_mul, quasar_kernels.silu_mul_quantize, definitions.silu_mul),
            (quasar_kernels.gelu_mul, quasar_kernels.gelu_mul_quantize, definitions.gelu_mul),
        ):
            found = plain(gate_up)
            assert relative_error(found, definition(gate_up)) < 4e-3
            for group_size in (None, 32):
                values, scales = definitions.quantized(found, group_size)
                quantized = quantizing(gate_up, group_size)
                assert torch.equal(quantized[0], values)
                assert torch.equal(quantized[1], scales)
        update = normal(rows, size, seed=5, dtype=torch.bfloat16)
        added = quasar_kernels.add_scaled(x, update, 0.22)
        assert torch.equal(added, x + update * 0.22)


def test_swiglu_far_from_zero(level: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 1e30] * 4)
    gate_up = torch.cat([gate, torch.ones(32)]).bfloat16().unsqueeze(0)
    found = quasar_kernels.silu_mul(gate_up)
    assert torch.allclose(found.float(), definitions.silu_mul(gate_up).float(), rtol=8e-3, atol=1e-7)
    found = quasar_kernels.gelu_mul(gate_up)
    assert torch.allclose(found.float(), definitions.gelu_mul(gate_up).float(), rtol=8e-3, atol=1e-7)


@pytest.mark.parametrize("size", [16, 64, 80, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_maxima(level: str, size: int, dtype: torch.dtype) -> None:
    x = normal(33, size, dtype=dtype)
    assert len(set(x[0].tolist())) < size or size < 4096 or dtype == torch.float32  # bfloat16 has ties
    x[1], x[2] = -3.0, -torch.inf
    x[2, 7] = -1e30
    x[3, size - 1], x[3, size - 2] = 99.0, 99.0
    x[4], x[4, 3] = -0.0, 0.0
    expected = [row.tolist().index(row.max().item()) for row in x]
    assert expected[1:5] == [0, 7, size - 2, 0]
    for rows in (1, 2, 33):
        assert quasar_kernels.first_maxima(x[:rows]).tolist() == expected[:rows]
    # Rows whose elements do not lie side by side.
    assert quasar_kernels.first_maxima(x.T.contiguous().T).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_inputs(level: str, dtype: torch.dtype) -> None:
    indices = torch.randperm(77, generator=torch.Generator().manual_seed(0))
    x = normal(130, 77, dtype=dtype)
    for rows in (1, 130):
        found = quasar_kernels.select_inputs(x[:rows], InputOrder(indices))
        assert torch.equal(found, torch.stack([x[:rows, index] for index in indices], dim=1))
    with pytest.raises(ValueError, match=r"x: expected \[M, 77\], got \[130, 76\]"):
        select_inputs.OP.check(x[:, :76], InputOrder(indices))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("normalized", [False, True])
def test_rotary_write(level: str, head_dim: int, normalized: bool) -> None:
    heads, kv_heads, capacity = 6, 2, 40
    norms = None
    if normalized:
        norms = normal(head_dim, seed=1, dtype=torch.bfloat16), normal(head_dim, seed=2, dtype=torch.bfloat16)
    for rows, start in [(1, 0), (5, 35), (17, 9)]:
        qkv = normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16)
        angles = normal(rows, head_dim // 2).repeat(1, 2)
        rotation = angles.cos(), angles.sin()
        keys, values = (normal(kv_heads, capacity, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (3, 4))
        written = definitions.rotary_write(qkv, rotation, (keys, values), start, norms, 1e-6)
        expected, expected_keys, expected_values = written
        by_tensor = (keys, values, torch.tensor([start]), *(norms or (None, None)), 1e-6)
        q = quasar_kernels.rotary_write(qkv, *rotation, *by_tensor)
        # The definition rounds at the end alone, the op after the norm, its weight and the rotation.
        assert relative_error(q, expected) < (1e-2 if normalized else 4e-3)
        assert relative_error(keys, expected_keys) < (1e-2 if normalized else 4e-3)
        others = [slot for slot in range(capacity) if not start <= slot < start + rows]
        assert torch.equal(keys[:, others].double(), expected_keys[:, others])
        assert torch.equal(values.double(), expected_values)
        plain_keys, plain_values = torch.zeros_like(keys), torch.zeros_like(values)
        by_tensor = (plain_keys, plain_values, *by_tensor[2:])
        assert relative_error(q, rotary_write.OP.plain(qkv, *rotation, *by_tensor)) < 4e-3
        written_slots = slice(start, start + rows)
        assert relative_error(keys[:, written_slots], plain_keys[:, written_slots]) < 4e-3


@pytest.mark.parametrize("whole", [False, True])
def test_norms_of_heads_with_one_plus_and_of_all_heads(level: str, whole: bool) -> None:
    heads, kv_heads, head_dim, rows, start = 6, 2, 64, 5, 3
    sizes = (heads * head_dim, kv_heads * head_dim) if whole else (head_dim, head_dim)
    norms = normal(sizes[0], seed=1, dtype=torch.bfloat16), normal(sizes[1], seed=2, dtype=torch.bfloat16)
    qkv = normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16)
    angles = normal(rows, head_dim // 2).repeat(1, 2)
    for one_plus in (False, True):
        keys, values = (normal(kv_heads, 20, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (3, 4))
        expected, expected_keys, _ = definitions.rotary_write(
            qkv, (angles.cos(), angles.sin()), (keys, values), start, norms, 1e-6, one_plus
        )
        q = quasar_kernels.rotary_write(
            qkv, angles.cos(), angles.sin(), keys, values, torch.tensor([start]), *norms, 1e-6, one_plus
        )
        assert relative_error(q, expected) < 1e-2
        assert relative_error(keys, expected_keys) < 1e-2


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_attention_over_a_cache(level: str, head_dim: int) -> None:
    """Masks as trees have them; slots behind the block are never read."""
    shapes = [(1, 3, 1, 0), (8, 9, 3, 292), (5, 4, 4, 124), (33, 8, 2, 107), (2, 40, 1, 14)]
    for rows, heads, kv_heads, context in shapes:
        q = normal(rows, heads, head_dim, dtype=torch.bfloat16)
        slots = context + rows
        keys, values = (normal(kv_heads, slots + 5, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
        mask = torch.rand(rows, rows, generator=torch.Generator().manual_seed(3)) < 0.6
        mask.fill_diagonal_(True)
        found = quasar_kernels.block_attention(q, keys, values, torch.tensor([context]), mask)
        assert relative_error(found, definitions.block_attention(q, keys, values, context, mask)) < 1e-2


@needs_kernels
def test_attention_of_a_row_depends_on_what_it_sees_alone(level: str) -> None:
    if level == "torch":
        pytest.skip("holds for the kernels")
    rows, heads, kv_heads, head_dim, context = 70, 6, 2, 64, 250
    q = normal(rows, heads, head_dim, dtype=torch.bfloat16)
    keys, values = (normal(kv_heads, 400, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))

    def attend(first: int, end: int) -> torch.Tensor:
        """The rows from ``first`` to ``end`` as a block of their own, behind those before."""
        mask = torch.ones(end - first, end - first, dtype=torch.bool).tril_()
        return quasar_kernels.block_attention(q[first:end], keys, values, torch.tensor([context + first]), mask)

    block = attend(0, rows)
    for row in range(rows):
        assert torch.equal(attend(row, row + 1)[0], block[row])
    for size in (2, 3, 8, 32, 33):
        assert torch.equal(attend(0, size), block[:size])
    # What lies in hidden slots has no influence, not even through its magnitude.
    keys[:, context + 1 :], values[:, context + 1 :] = 1e4, -1e4
    assert torch.equal(attend(0, 1), block[:1])
    torch.set_num_threads(2)
    try:
        assert torch.equal(attend(0, 1), block[:1])
    finally:
        torch.set_num_threads(1)


OPTIONS = [
    AttentionOptions(window=3),
    AttentionOptions(window=130, scale=0.05),
    AttentionOptions(softcap=2.0),
    AttentionOptions(window=128, softcap=30.0, scale=0.3),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_with_window_softcap_and_scale(level: str, options: AttentionOptions) -> None:
    """Contexts that end before, in and after the window, in chains and trees."""
    for rows, heads, kv_heads, context in [
        (1, 3, 1, 0),
        (8, 9, 3, 292),
        (5, 4, 4, 124),
        (40, 8, 2, 107),
        (1, 2, 1, 600),
    ]:
        q = normal(rows, heads, 64, dtype=torch.bfloat16)
        keys, values = (normal(kv_heads, context + rows + 5, 64, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
        chain = torch.ones(rows, rows, dtype=torch.bool).tril()
        tree = definitions.ancestors([(row - 1) // 2 if row else -1 for row in range(rows)])
        for mask in (chain, tree):
            found = quasar_kernels.block_attention(q, keys, values, torch.tensor([context]), mask, options)
            expected = definitions.block_attention(q, keys, values, context, mask, options)
            assert relative_error(found, expected) < 1e-2


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_window_keeps_rows_independent(level: str, options: AttentionOptions) -> None:
    """A row of a chain or tree has the bits that it has alone, and slots before its window have no influence."""
    if level == "torch":
        pytest.skip("holds for the kernels")
    context, rows = 250, 40
    q = normal(rows, 6, 64, dtype=torch.bfloat16)
    keys, values = (normal(2, context + rows, 64, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    alone = torch.ones(1, 1, dtype=torch.bool)
    for parents in (list(range(-1, rows - 1)), [(row - 1) // 2 if row else -1 for row in range(rows)]):
        mask = definitions.ancestors(parents)
        block = quasar_kernels.block_attention(q, keys, values, torch.tensor([context]), mask, options)
        for row in range(rows):
            branch = [*range(context), *(context + mask[row].nonzero().flatten()).tolist()]
            own_keys, own_values = keys[:, branch].contiguous(), values[:, branch].contiguous()
            if options.window is not None:
                own_keys[:, : -options.window], own_values[:, : -options.window] = 1e4, -1e4
            start = torch.tensor([len(branch) - 1])
            expected = quasar_kernels.block_attention(q[row : row + 1], own_keys, own_values, start, alone, options)
            assert torch.equal(block[row : row + 1], expected), f"row {row}"


@needs_kernels
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(96, 32, 64), (128, 16, 32), (64, 64, 96)])
@pytest.mark.parametrize("context", [0, 1, 100, 127, 128, 129, 250])
def test_attention_of_a_node_has_the_bits_of_its_branch(
    level: str, heads: int, kv_heads: int, head_dim: int, context: int
) -> None:
    """A node of a tree is computed as in autoregressive decoding, although its branch has gaps between its slots."""
    if level == "torch":
        pytest.skip("holds for the kernels")
    rows, generator = 40, torch.Generator().manual_seed(context)
    parents = [-1, *(int(torch.randint(row, (), generator=generator)) for row in range(1, rows))]
    mask = torch.eye(rows, dtype=torch.bool)
    for row in range(1, rows):
        mask[row] |= mask[parents[row]]
    q = normal(rows, heads, head_dim, dtype=torch.bfloat16)
    keys, values = (normal(kv_heads, context + rows, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    tree = quasar_kernels.block_attention(q, keys, values, torch.tensor([context]), mask)
    for row in range(rows):
        branch = [*range(context), *(context + mask[row].nonzero().flatten()).tolist()]
        own_keys, own_values = keys[:, branch].contiguous(), values[:, branch].contiguous()
        start, alone = torch.tensor([len(branch) - 1]), torch.ones(1, 1, dtype=torch.bool)
        expected = quasar_kernels.block_attention(q[row : row + 1], own_keys, own_values, start, alone)
        assert torch.equal(tree[row : row + 1], expected), f"row {row}"


def test_gradients_take_the_way_of_pytorch() -> None:
    x = normal(3, 64, dtype=torch.bfloat16).requires_grad_()
    quasar_kernels.add_rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-5)[0].sum().backward()
    assert x.grad is not None


def test_float16_activations_that_are_quantized_already(level: str) -> None:
    x = normal(5, 96).half()
    int8, int4 = int8_weight(64, 96), int4_weight(64, 96, 32, "integer", torch.float16)
    found = quasar_kernels.linear_w8a8(Quantized(*definitions.quantized(x), x.dtype), int8)
    assert found.dtype == torch.float16
    assert torch.equal(found, quasar_kernels.linear_w8a8(x, int8))
    found = quasar_kernels.linear_w4a8(Quantized(*definitions.quantized(x, 32), x.dtype), int4)
    assert found.dtype == torch.float16
    assert torch.equal(found, quasar_kernels.linear_w4a8(x, int4))


class Guarded:
    """Memory between two pages that must not be touched; a tensor lies at its end, or at its start."""

    _library = ctypes.CDLL(None, use_errno=True)

    def __init__(self, at_end: bool) -> None:
        self._at_end = at_end
        self._maps: list[mmap.mmap] = []

    def copy(self, source: Tensor) -> Tensor:
        pages = -(-source.nbytes // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        self._maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + (pages + 1) * mmap.PAGESIZE):
            assert self._library.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
        offset = mmap.PAGESIZE + (pages * mmap.PAGESIZE - source.nbytes if self._at_end else 0)
        guarded = torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=offset)
        return guarded.view(source.shape).copy_(source)

    def optional(self, source: Tensor | packing.PackedNumbers | None) -> Tensor | packing.PackedNumbers | None:
        if isinstance(source, packing.PackedNumbers):
            factors = None if source.factors is None else self.copy(source.factors)
            return packing.PackedNumbers(self.copy(source.values), factors)
        return None if source is None else self.copy(source)


def dies(action: Callable[[], None]) -> bool:
    """Whether the action kills a child process."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def run_guarded(at_end: bool) -> None:
    """Every kernel of the current level on guarded operands and results."""
    guarded = Guarded(at_end)
    loaded = library.backend()
    assert loaded is not None

    def product(
        function: library.MatmulFunction, weight: packing.PackedWeight, x: Tensor, quantized: bool = False
    ) -> None:
        scales, zeros = guarded.optional(weight.scales), guarded.optional(weight.zeros)
        inside = packing.PackedWeight(
            guarded.copy(weight.values), weight.inputs, scales, zeros, weight.group_size, weight.scale_unit
        )
        bias = guarded.copy(torch.zeros(weight.outputs))
        out = guarded.copy(torch.zeros(len(x), weight.outputs, dtype=x.dtype))
        flags = library.ACTIVATIONS_BFLOAT16 if x.dtype == torch.bfloat16 else 0
        token_scales = None
        if quantized:
            values, scales_of_tokens = definitions.quantized(x, weight.group_size or None)
            x, token_scales = values, guarded.copy(scales_of_tokens)
            flags |= library.ACTIVATIONS_INT8
        pointer = None if token_scales is None else token_scales.data_ptr()
        x = guarded.copy(x)
        function(inside.address, x.data_ptr(), pointer, out.data_ptr(), bias.data_ptr(), len(x), flags, 1)

    for rows in (1, 5, 17, 33):
        for dtype in DTYPES:
            x = normal(rows, 160, dtype=dtype)
            for quantized in (False, True):
                product(loaded.linear_w8a8, packed(int8_weight(32, 160)), x, quantized)
                for zeros in ("symmetric", "integer", "fraction"):
                    product(loaded.linear_w4a8, packed(int4_weight(32, 160, 32, zeros, dtype)), x, quantized)
            product(loaded.linear_w8a16, packed(int8_weight(32, 160)), x)
            for zeros in ("symmetric", "integer", "fraction"):
                product(loaded.linear_w4a16, packed(int4_weight(32, 160, 32, zeros, dtype)), x)
            wide = normal(rows, 256, dtype=dtype)
            for bits, function in ((4, loaded.linear_w4a16), (8, loaded.linear_w8a16)):
                for size, shared in ((16, 16), (32, 8), (32, 1)):
                    product(function, packed(weight_in_blocks(bits, (32, 256), size, shared, True, dtype)[0]), wide)
            product(loaded.linear_bf16, packed(DenseWeight(normal(32, 160).bfloat16())), x)
            product(loaded.linear_f32, packed(DenseWeight(normal(32, 160))), x)
        run_fused_guarded(loaded, guarded, rows)


def packed(weight: Int8Weight | GroupInt8Weight | Int4Weight | DenseWeight) -> packing.PackedWeight:
    found = weight.packed_for_cpu
    assert found is not None
    return found


def run_fused_guarded(loaded: library.Library, guarded: Guarded, rows: int) -> None:
    def bfloat16(*shape: int) -> int:
        tensors.append(guarded.copy(normal(*shape, dtype=torch.bfloat16)))
        return tensors[-1].data_ptr()

    def other(*shape: int, dtype: torch.dtype = torch.float32) -> int:
        tensors.append(guarded.copy(torch.ones(*shape, dtype=dtype)))
        return tensors[-1].data_ptr()

    tensors: list[Tensor] = []
    size, heads, kv_heads, head_dim, slots = 96, 3, 1, 96, 150 + rows
    x, weight, sums = bfloat16(rows, size), bfloat16(size), bfloat16(rows, size)
    quantized = other(rows, size, dtype=torch.int8), other(rows, size // 32)
    loaded.rms_norm(x, None, weight, None, bfloat16(rows, size), None, None, rows, size, size, 1e-5, 0, 1)
    loaded.rms_norm(x, bfloat16(rows, size), weight, sums, None, *quantized, rows, size, 32, 1e-5, 1, 1)
    loaded.silu_mul(bfloat16(rows, 2 * size), bfloat16(rows, size), None, None, rows, size, size, 1)
    loaded.silu_mul(bfloat16(rows, 2 * size), None, *quantized, rows, size, 32, 1)
    loaded.gelu_mul(bfloat16(rows, 2 * size), bfloat16(rows, size), None, None, rows, size, size, 1)
    loaded.add_scaled(x, bfloat16(rows, size), bfloat16(rows, size), rows, size, 0.5, 1)
    loaded.first_maxima(x, other(rows, dtype=torch.int64), rows, size, 1)
    order = guarded.copy(torch.arange(size).flip(0))
    loaded.select_inputs(x, order.data_ptr(), bfloat16(rows, size), rows, size, 1)
    q, out = bfloat16(rows, heads, head_dim), bfloat16(rows, heads, head_dim)
    cache = bfloat16(kv_heads, slots, head_dim), bfloat16(kv_heads, slots, head_dim)
    qkv, rotation = bfloat16(rows, (heads + 2 * kv_heads) * head_dim), (other(rows, head_dim), other(rows, head_dim))
    norms = bfloat16(head_dim), bfloat16(head_dim)
    shape = rows, heads, kv_heads, head_dim
    start = guarded.copy(torch.tensor([slots - rows]))
    place = start.data_ptr(), *shape, slots
    loaded.rotary_write(qkv, *rotation, *norms, q, *cache, None, None, *place, 16, 1e-5, 0, 0, 1)
    mask = other(rows, rows, dtype=torch.bool)
    loaded.attention(q, *cache, None, None, mask, out, *place, 16, 1, 2.0, 0.0, 1)
    for bits in (8, 4):
        parts = [slot_storage((kv_heads, slots, head_dim), bits, "cpu") for _ in range(2)]
        codes, scales = zip(*[[guarded.copy(part) for part in stored] for stored in parts], strict=True)
        tensors += [*codes, *scales]
        cache = tuple(part.data_ptr() for part in (*codes, *scales))
        loaded.rotary_write(qkv, *rotation, *norms, q, *cache, *place, bits, 1e-5, 0, 0, 1)
        loaded.attention(q, *cache, mask, out, *place, bits, 0, 0.0, 0.0, 1)


@needs_kernels
@pytest.mark.parametrize("at_end", [True, False])
def test_no_access_outside_the_operands(level: str, at_end: bool) -> None:
    if level == "torch":
        pytest.skip("holds for the kernels")
    assert not dies(lambda: run_guarded(at_end))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_guards_notice_one_byte() -> None:
    def touch(offset: int, at_end: bool) -> None:
        tensor = Guarded(at_end).copy(torch.zeros(100, dtype=torch.uint8))
        ctypes.memset(tensor.data_ptr() + offset, 0, 1)

    assert not dies(lambda: touch(99, at_end=True))
    assert dies(lambda: touch(100, at_end=True))
    assert dies(lambda: touch(-1, at_end=False))
