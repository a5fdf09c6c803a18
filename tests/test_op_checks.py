"""No op passes an array to a kernel that the kernel would leave: wrong shapes, dtypes and gaps are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import quasar_kernels
import torch
from quasar_kernels import (
    DenseWeight,
    GroupInt8Weight,
    GroupNumbers,
    InputOrder,
    Int4Weight,
    Int8Weight,
    Quantized,
    QuantizedSlots,
)
from quasar_kernels.cpu import packing
from quasar_kernels.cpu.levels import available_levels
from quasar_kernels.slots import slot_storage

ROWS, HIDDEN, HEADS, KV_HEADS, DIM, SLOTS = 3, 64, 4, 2, 32, 8
needs_kernels = pytest.mark.skipif(not available_levels() or shutil.which("g++") is None, reason="no CPU kernels")


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def norm() -> dict[str, Any]:
    return {"x": bf16(ROWS, HIDDEN), "weight": bf16(HIDDEN), "eps": 1e-5, "residual": bf16(ROWS, HIDDEN)}


def rotary() -> dict[str, Any]:
    return {
        "qkv": bf16(ROWS, (HEADS + 2 * KV_HEADS) * DIM),
        "cos": torch.ones(ROWS, DIM),
        "sin": torch.ones(ROWS, DIM),
        "keys": bf16(KV_HEADS, SLOTS, DIM),
        "values": bf16(KV_HEADS, SLOTS, DIM),
        "start": torch.zeros(1, dtype=torch.int64),
        "q_norm": bf16(DIM),
        "k_norm": bf16(DIM),
        "eps": 1e-5,
    }


def attention() -> dict[str, Any]:
    return {
        "q": bf16(ROWS, HEADS, DIM),
        "keys": bf16(KV_HEADS, SLOTS, DIM),
        "values": bf16(KV_HEADS, SLOTS, DIM),
        "start": torch.zeros(1, dtype=torch.int64),
        "block_mask": torch.ones(ROWS, ROWS, dtype=torch.bool),
    }


def slots(bits: int, capacity: int = SLOTS, kv_heads: int = KV_HEADS, dim: int = DIM) -> QuantizedSlots:
    return QuantizedSlots(*slot_storage((kv_heads, capacity, dim), bits, "cpu"))


def with_scales(bits: int, scales: torch.Tensor) -> QuantizedSlots:
    return QuantizedSlots(slots(bits).codes, scales)


def with_cache(bits: int, arguments: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: arguments() | {"keys": slots(bits), "values": slots(bits)}


WRONG_SLOTS: dict[int, list[QuantizedSlots | torch.Tensor]] = {
    8: [
        slots(4),
        bf16(KV_HEADS, SLOTS, DIM),
        slots(8, capacity=SLOTS - 1),
        slots(8, kv_heads=1),
        slots(8, dim=2 * DIM),
        with_scales(8, torch.ones(KV_HEADS, SLOTS - 1, 1)),
        with_scales(8, torch.ones(KV_HEADS, SLOTS, 1).half()),
        with_scales(8, torch.ones(KV_HEADS, SLOTS)),
        with_scales(8, torch.ones(KV_HEADS, SLOTS, 2)[..., :1]),
        with_scales(8, torch.ones(SLOTS, KV_HEADS, 1).transpose(0, 1)),
        with_scales(8, torch.ones(KV_HEADS, 2 * SLOTS, 1)[:, :SLOTS]),
        QuantizedSlots(torch.zeros(SLOTS, KV_HEADS, DIM, dtype=torch.int8).transpose(0, 1), slots(8).scales),
    ],
    4: [
        slots(8),
        slots(4, capacity=SLOTS - 1),
        slots(4, dim=2 * DIM),
        with_scales(4, torch.ones(KV_HEADS, SLOTS, 1).half()),
        with_scales(4, torch.ones(KV_HEADS, SLOTS, 2)),
    ],
}


def int4() -> Int4Weight:
    packed = torch.zeros(32, HIDDEN // 2, dtype=torch.uint8)
    return Int4Weight(packed, torch.ones(32, 2), torch.full((32, 2), 8.0), True)


def int8() -> Int8Weight:
    return Int8Weight(torch.zeros(32, HIDDEN, dtype=torch.int8), torch.ones(32))


def dense() -> DenseWeight:
    return DenseWeight(bf16(32, HIDDEN))


def matmul(weight: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": bf16(ROWS, HIDDEN), "weight": weight(), "bias": bf16(32)}


def quantized(groups: int, dtype: torch.dtype = torch.int8) -> Quantized:
    return Quantized(torch.zeros(ROWS, HIDDEN).to(dtype), torch.ones(ROWS, groups), torch.bfloat16)


WRONG_X = [("x", bf16(ROWS, HIDDEN * 2)), ("x", bf16(HIDDEN)), ("bias", bf16(16)), ("bias", bf16(1))]
OPS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]], list[tuple[str, Any]]]] = [
    (
        quasar_kernels.add_rms_norm,
        norm,
        [
            ("weight", bf16(1)),
            ("weight", bf16(HIDDEN // 2)),
            ("weight", bf16(HIDDEN * 2)[::2]),
            ("residual", bf16(ROWS - 1, HIDDEN)),
            ("residual", bf16(1)),
            ("residual", torch.ones(ROWS, HIDDEN)),
        ],
    ),
    (
        quasar_kernels.add_rms_norm_quantize,
        lambda: norm() | {"group_size": 32},
        [("weight", bf16(1)), ("residual", bf16(1, HIDDEN)), ("group_size", 48), ("group_size", 128)],
    ),
    (quasar_kernels.silu_mul, lambda: {"gate_up": bf16(ROWS, 64)}, [("gate_up", bf16(64)[None, None])]),
    (
        quasar_kernels.silu_mul_quantize,
        lambda: {"gate_up": bf16(ROWS, 128), "group_size": 32},
        [("group_size", 48), ("group_size", 128)],
    ),
    (
        quasar_kernels.rotary_write,
        rotary,
        [
            ("qkv", bf16(ROWS, 2 * KV_HEADS * DIM)),
            ("qkv", bf16(SLOTS + 1, (HEADS + 2 * KV_HEADS) * DIM)),
            ("cos", torch.ones(1, DIM)),
            ("cos", torch.ones(ROWS, DIM // 2)),
            ("cos", torch.ones(ROWS, DIM).double()),
            ("sin", torch.ones(ROWS, 2 * DIM)[:, ::2]),
            ("values", bf16(KV_HEADS, SLOTS - 1, DIM)),
            ("values", bf16(1, SLOTS, DIM)),
            ("values", torch.ones(KV_HEADS, SLOTS, DIM)),
            ("values", bf16(SLOTS, KV_HEADS, DIM).transpose(0, 1)),
            ("start", torch.zeros(1, dtype=torch.int32)),
            ("start", torch.zeros(2, dtype=torch.int64)),
            ("q_norm", bf16(1)),
            ("k_norm", None),
            ("k_norm", bf16(2 * DIM)[::2]),
        ],
    ),
    (
        quasar_kernels.block_attention,
        attention,
        [
            ("q", bf16(ROWS, HEADS + 1, DIM)),
            ("values", bf16(KV_HEADS, SLOTS - 1, DIM)),
            ("values", torch.ones(KV_HEADS, SLOTS, DIM)),
            ("start", torch.zeros(1, dtype=torch.int32)),
            ("block_mask", torch.ones(ROWS, ROWS - 1, dtype=torch.bool)),
            ("block_mask", torch.ones(ROWS + 1, ROWS + 1, dtype=torch.bool)),
        ],
    ),
    *(
        (op, with_cache(bits, arguments), [(name, wrong) for wrong in WRONG_SLOTS[bits] for name in ("keys", "values")])
        for op, arguments in ((quasar_kernels.rotary_write, rotary), (quasar_kernels.block_attention, attention))
        for bits in (8, 4)
    ),
    (
        quasar_kernels.select_inputs,
        lambda: {"x": bf16(ROWS, HIDDEN), "order": InputOrder(torch.arange(HIDDEN))},
        [("x", bf16(ROWS, HIDDEN - 1)), ("x", bf16(HIDDEN)), ("order", InputOrder(torch.arange(HIDDEN - 1)))],
    ),
    (quasar_kernels.linear_w8a8, matmul(int8), [*WRONG_X, ("x", quantized(2)), ("x", quantized(1, torch.int16))]),
    (quasar_kernels.linear_w8a16, matmul(int8), WRONG_X),
    (quasar_kernels.linear_w4a8, matmul(int4), [*WRONG_X, ("x", quantized(1)), ("x", quantized(4))]),
    (quasar_kernels.linear_w4a16, matmul(int4), WRONG_X),
    (quasar_kernels.linear_bf16, matmul(dense), WRONG_X),
]


@needs_kernels
@pytest.mark.parametrize(("op", "good", "wrong"), OPS, ids=[op.__name__ for op, _, _ in OPS])
def test_arguments_that_a_kernel_would_leave_are_refused(
    op: Callable[..., Any], good: Callable[[], dict[str, Any]], wrong: list[tuple[str, Any]]
) -> None:
    with torch.inference_mode():
        op(**good())
        for name, value in wrong:
            # Either the op's check, or PyTorch where no kernel takes such arguments: never a result.
            arguments = good() | {name: value}
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                op(**arguments)


@pytest.mark.parametrize("scales", [torch.ones(1), torch.ones(()), torch.ones(32, 1), torch.ones(31), torch.ones(64)])
def test_int8_weights_have_a_scale_for_each_output(scales: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int8 values \[N, K\] with scales \[N\]"):
        Int8Weight(torch.zeros(32, 64, dtype=torch.int8), scales)
    with pytest.raises(ValueError, match="group_size: expected 0 or a divisor of 64, got 48"):
        Int8Weight(torch.zeros(32, 64, dtype=torch.int8), torch.ones(32), 48)
    with pytest.raises(ValueError, match="expected int8"):
        Int8Weight(torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32))


@pytest.mark.parametrize(
    ("scales", "zeros"), [((1, 2), (1, 2)), ((32,), (32,)), ((32, 3), (32, 3)), ((32, 2), (32, 1)), ((32, 0), (32, 0))]
)
def test_int4_weights_have_scales_for_each_group(scales: tuple[int, ...], zeros: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[N, K / 2\] with scales and zeros \[N, G\]"):
        Int4Weight(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(scales), torch.ones(zeros), False, torch.bfloat16)


def test_packed_weights_have_all_their_scales() -> None:
    values = torch.zeros(2, 16, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected 32 scales"):
        packing.PackedWeight(values, 64, torch.ones(1))
    with pytest.raises(ValueError, match="expected 64 scales"):
        packing.PackedWeight(values, 64, packing.PackedNumbers(torch.ones(2, 1, 16)), group_size=32)
    shared = packing.PackedNumbers(torch.ones(2, 1, 16), torch.ones(2, 1, 16, dtype=torch.int8))
    with pytest.raises(ValueError, match="expected 64 scales"):
        packing.PackedWeight(values, 64, shared, group_size=32)


@pytest.mark.parametrize(("shared", "groups"), [(1, 3), (2, 3), (4, 2)])
def test_shared_scales_belong_to_a_power_of_two_of_groups(shared: int, groups: int) -> None:
    with pytest.raises(ValueError, match="G a power of two times S"):
        GroupNumbers(torch.ones(32, shared), torch.ones(32, groups, dtype=torch.int8))


def test_int8_weights_in_groups_have_minimums_for_each_group() -> None:
    values, two, four = torch.zeros(32, 64, dtype=torch.int8), *(GroupNumbers(torch.ones(32, n)) for n in (2, 4))
    with pytest.raises(ValueError, match=r"got torch\.int8 \[32, 64\] with 2 groups"):
        GroupInt8Weight(values, two, four)


@needs_kernels
def test_every_part_of_a_quantized_cache_is_checked() -> None:
    """A slice of all slots is taken; scales of other heads than those of the codes are named."""
    capacity = slots(8, capacity=2 * SLOTS)
    good = attention() | {"keys": capacity.first(SLOTS), "values": capacity.first(SLOTS)}
    with torch.inference_mode():
        assert quasar_kernels.block_attention(**good).shape == (ROWS, HEADS * DIM)
        wrong = with_scales(8, torch.ones(KV_HEADS, 2 * SLOTS, 1)[:, :SLOTS])
        with pytest.raises(ValueError, match="as many slots from head to head"):
            quasar_kernels.block_attention(**attention() | {"keys": wrong, "values": wrong})
        with pytest.raises(ValueError, match="values: expected them in 8 bits like the keys"):
            quasar_kernels.block_attention(**attention() | {"keys": slots(8)})
