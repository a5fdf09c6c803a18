"""The table of ops, the choice of backends, and PyTorch's own operations compared with `tests.definitions`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quasar_kernels.ops
import torch
from quasar_kernels import AttentionOptions, DenseWeight, InputOrder, Int4Weight, Int8Weight, Quantized, cpu, dispatch
from quasar_kernels.cases import LAYERS, Layer, Setting
from quasar_kernels.dispatch import Kernel, LayerOp, Op
from quasar_kernels.matmul import Matmul
from quasar_kernels.ops import (
    LAYER_OPS,
    MATMULS,
    add_rms_norm,
    add_scaled,
    block_attention,
    first_maxima,
    gelu_mul,
    linear_w4a8,
    rotary_write,
    select_inputs,
    silu_mul,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import definitions

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Tolerances relative to the largest value of a result; norms and rotations round three times.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
ROWS = (1, 3, 17, 65, 130)
SMALL = Layer(96, 160, 6, 2, 32, True, 100)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.isfinite().all()
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error.item() < TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def int4_weight(group_size: int, zeros: float | None, dtype: torch.dtype) -> Int4Weight:
    """[48, 192]; random integer zero points if ``zeros`` is None."""
    generator = torch.Generator().manual_seed(group_size)
    groups = 48, 192 // group_size
    packed = torch.randint(0, 256, (48, 96), dtype=torch.uint8, generator=generator)
    offsets = torch.randint(0, 16, groups, generator=generator).float() if zeros is None else torch.full(groups, zeros)
    return Int4Weight(packed, torch.rand(groups, generator=generator) + 0.1, offsets, zeros == 8, dtype)


def matmul(weight_bits: int, activations: str = "float") -> Matmul:
    (found,) = [op for op in MATMULS if (op.weight_bits, op.activations) == (weight_bits, activations)]
    return found


def test_every_file_of_an_op_is_in_the_table() -> None:
    files = {path.stem for path in Path(quasar_kernels.ops.__file__).parent.glob("*.py")} - {"__init__"}
    names = [op.name for op in (*MATMULS, *LAYER_OPS)]
    assert len(set(names)) == len(names) == 21
    assert files == {re.sub("_quantize$|_kv[48]$", "", name) for name in names}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_and_int8_matmuls(dtype: torch.dtype) -> None:
    dense, bias = normal(48, 192, dtype=dtype), normal(48, dtype=dtype)
    values = torch.randint(-127, 128, (48, 192), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    int8 = Int8Weight(values, torch.rand(48, generator=torch.Generator().manual_seed(2)) + 0.1)
    for rows in ROWS:
        x = normal(rows, 192, dtype=dtype)
        found = matmul(16).plain(x, DenseWeight(dense), bias)
        assert_close(found, definitions.linear(x, dense, bias), dtype)
        found = matmul(8).plain(x, int8, bias)
        assert_close(found, definitions.linear_int8(x, values, int8.scales, bias), dtype)
        quantized = Quantized(*definitions.quantized(x), dtype)
        for argument in (x, quantized):
            found = matmul(8, "int8").plain(argument, int8, bias)
            assert found.dtype == dtype
            expected = definitions.linear_w8a8(*quantized, values, int8.scales, bias)
            if dtype == torch.float64:
                assert_close(found, expected, dtype)
            else:
                assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [8.0, None, 7.3])
@pytest.mark.parametrize("group_size", [32, 96, 192])
def test_int4_matmuls(dtype: torch.dtype, zeros: float | None, group_size: int) -> None:
    """More rows too than any kernel takes: on a GPU PyTorch's operations compute a prompt."""
    weight, bias = int4_weight(group_size, zeros, dtype), normal(48, dtype=dtype)
    for rows in ROWS:
        x = normal(rows, 192, dtype=dtype)
        found = matmul(4).plain(x, weight, bias)
        assert_close(found, definitions.linear_int4(x, *weight.canonical(), bias), dtype)
        quantized = Quantized(*definitions.quantized(x, group_size), dtype)
        expected = definitions.linear_w4a8(*quantized, weight.canonical(), bias)
        for argument in (x, quantized):
            found = matmul(4, "int8 groups").plain(argument, weight, bias)
            assert found.dtype == dtype
            if zeros == 7.3 or dtype == torch.float64:
                assert_close(found, expected, dtype)
            else:
                assert torch.equal(found, expected)


class NoFloat64(TorchDispatchMode):
    """Fails at the first operation that computes in float64, which GPUs do slowly or not at all."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            assert not isinstance(one, Tensor) or one.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("op", MATMULS, ids=[op.name for op in MATMULS])
def test_no_matmul_falls_back_to_float64(op: Matmul) -> None:
    weight = op.round(normal(48, 192, dtype=torch.bfloat16), 64)
    x = normal(100, 192, dtype=torch.bfloat16)
    with NoFloat64():
        assert op.plain(x, weight).shape == (100, 48)


@pytest.mark.parametrize("op", LAYER_OPS, ids=[op.name for op in LAYER_OPS])
def test_no_other_op_falls_back_to_float64(op: LayerOp) -> None:
    case = op.case(Setting(SMALL, 70, 9))
    with NoFloat64():
        op.plain(*case.arguments)


def test_the_w4a8_fallback_multiplies_whole_groups() -> None:
    """One matmul per group; weights unpacked row by row or rows one by one would take many times as long."""
    weight = int4_weight(64, None, torch.bfloat16)
    calls: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Counting():
        linear_w4a8.OP.plain(normal(100, 192, dtype=torch.bfloat16), weight)
    assert sum(name in ("mm", "linear", "addmm") for name in calls) == 192 // 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_norms_and_swiglu(dtype: torch.dtype, rows: int) -> None:
    x, residual = normal(rows, 96, dtype=dtype), normal(rows, 96, dtype=dtype).flip(0)
    weight = normal(96, dtype=dtype)
    for added in (None, residual):
        total = x if added is None else (x.double() + added.double()).to(dtype)
        found, found_total = add_rms_norm.OP.plain(x, weight, 1e-5, added)
        assert torch.equal(found_total, total)
        assert_close(found, definitions.rms_norm(total, weight, 1e-5), dtype)
        shifted, _ = add_rms_norm.OP.plain(x, weight, 1e-5, added, True)
        assert_close(shifted, definitions.rms_norm(total, weight, 1e-5, one_plus=True), dtype)
        for group_size in (None, 32):
            values, scales, found_total = add_rms_norm.QUANTIZING.plain(x, weight, 1e-5, added, False, group_size)
            expected = definitions.quantized(found, group_size)
            assert torch.equal(values, expected[0])
            assert torch.equal(scales, expected[1])
            assert torch.equal(found_total, total)
    gate_up = torch.cat([x * 4, residual], dim=1)
    for module, definition in ((silu_mul, definitions.silu_mul), (gelu_mul, definitions.gelu_mul)):
        found = module.OP.plain(gate_up)
        assert_close(found, definition(gate_up), dtype)
        for group_size in (None, 32):
            pairs = zip(
                module.QUANTIZING.plain(gate_up, group_size), definitions.quantized(found, group_size), strict=True
            )
            assert all(torch.equal(*pair) for pair in pairs)
    assert_close(add_scaled.OP.plain(x, residual, 0.3), x.double() + 0.3 * residual.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("normalized", [False, True])
def test_rotation_and_attention(dtype: torch.dtype, rows: int, normalized: bool) -> None:
    heads, kv_heads, head_dim, start = 6, 2, 32, 9
    cache = normal(kv_heads, 150, head_dim, dtype=dtype), normal(kv_heads, 150, head_dim, dtype=dtype).flip(1)
    qkv = normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = normal(rows, head_dim // 2).repeat(1, 2) * 3
    rotation = angles.cos(), angles.sin()
    norms = (normal(head_dim, dtype=dtype), normal(head_dim, dtype=dtype).flip(0)) if normalized else None
    expected, expected_keys, expected_values = definitions.rotary_write(qkv, rotation, cache, start, norms, 1e-6)
    slot = torch.tensor([start])
    q = rotary_write.OP.plain(qkv, *rotation, *cache, slot, *(norms or (None, None)), 1e-6)
    for found, wanted in ((q, expected), (cache[0], expected_keys)):
        assert_close(found, wanted, dtype)
    if normalized:
        whole = normal(heads * head_dim, dtype=dtype), normal(kv_heads * head_dim, dtype=dtype).flip(0)
        found = rotary_write.OP.plain(qkv, *rotation, cache[0].clone(), cache[1].clone(), slot, *whole, 1e-6, True)
        wanted = definitions.rotary_write(qkv, rotation, cache, start, whole, 1e-6, one_plus=True)[0]
        assert_close(found, wanted, dtype)
    assert torch.equal(cache[1].double(), expected_values)
    mask = torch.rand(rows, rows, generator=torch.Generator().manual_seed(rows)) < 0.5
    mask.fill_diagonal_(True)
    for block_mask in (mask, mask.long()):
        found = block_attention.OP.plain(q, *cache, slot, block_mask)
        assert_close(found, definitions.block_attention(q, *cache, start, mask), dtype)


def test_select_inputs() -> None:
    order = InputOrder(torch.tensor([2, 0, 3, 1]))
    x = torch.tensor([[10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0]])
    for dtype in DTYPES:
        found = select_inputs.OP.plain(x.to(dtype), order)
        assert found.tolist() == [[30, 10, 40, 20], [3, 1, 4, 2]]
        assert found.dtype == dtype
    for wrong in ([0, 0, 1, 2], [1, 2, 3, 4], [-1, 0, 1, 2]):
        with pytest.raises(ValueError, match=r"expected a permutation, int64 \[K\]"):
            InputOrder(torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        InputOrder(torch.arange(4, dtype=torch.int32))


def test_first_maxima() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [-1.0, -2.0, -1.0], [0.0, 0.0, 5.0]])
    for dtype in DTYPES:
        assert first_maxima.OP.plain(x.to(dtype)).tolist() == [1, 0, 2]


@pytest.mark.parametrize("op", LAYER_OPS, ids=[op.name for op in LAYER_OPS])
def test_the_compiled_kernels_serve_every_op_of_a_layer(op: LayerOp) -> None:
    """Verification runs in 16 bit, and a silent fallback would be slow."""
    library = cpu.backend()
    if library is None:
        pytest.skip("this machine cannot compile the CPU kernels")
    for layer in LAYERS.values():
        case = op.case(Setting(layer, 3, 20))
        assert op.cpu is not None
        assert op.cpu.supports(*case.arguments)


class Elsewhere:
    """Replaces rows on a device that this machine does not have."""

    is_cpu = False


def test_the_ladder_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = True

    def backend_of(name: str) -> Any:
        return lambda *arguments: name

    def supports(*arguments: Any) -> bool:
        return taken

    op = Op("test", backend_of("plain"), Kernel(supports, backend_of("cpu")), Kernel(supports, backend_of("triton")))
    monkeypatch.setattr(dispatch, "backend", object)
    monkeypatch.setattr(dispatch, "has_gpu_kernels", lambda rows: True)
    x = torch.zeros(2, 2)
    assert op(x) == op(Quantized(x, x, x.dtype)) == "cpu"
    assert op(Elsewhere()) == "triton"
    with torch.inference_mode(False), torch.enable_grad():
        assert op(x) == op(Elsewhere()) == "plain"
        assert Op("test", op.plain, op.cpu, op.triton, differentiable=False)(x) == "cpu"
    taken = False
    assert op(x) == op(Elsewhere()) == "plain"
    taken = True
    assert Op("test", op.plain, None, None)(x) == Op("test", op.plain, None, None)(Elsewhere()) == "plain"
    monkeypatch.setattr(dispatch, "backend", lambda: None)
    monkeypatch.setattr(dispatch, "has_gpu_kernels", lambda rows: False)
    assert op(x) == op(Elsewhere()) == "plain"


@pytest.mark.parametrize(("rows", "context", "capacity"), [(1, 0, 1), (5, 7, 12), (5, 7, 40), (130, 20, 150)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_blocks_of_any_size(dtype: torch.dtype, rows: int, context: int, capacity: int) -> None:
    """Every row attends to the context and to the rows that its mask allows, but to nothing after the block."""
    q = normal(rows, 4, 32, dtype=dtype)
    keys, values = normal(2, capacity, 32, dtype=dtype), normal(2, capacity, 32, dtype=dtype).flip(1)
    mask = torch.rand(rows, rows, generator=torch.Generator().manual_seed(3)) < 0.5
    mask.fill_diagonal_(True)
    expected = definitions.block_attention(q, keys, values, context, mask)
    for given in (mask, mask.long()):  # captured passes keep it beside their other integers
        found = block_attention.OP.plain(q, keys, values, torch.tensor([context]), given)
        assert_close(found, expected, dtype)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(window=1),
        AttentionOptions(window=6),
        AttentionOptions(window=30),
        AttentionOptions(softcap=0.5),
        AttentionOptions(scale=0.9),
        AttentionOptions(window=9, softcap=2.0, scale=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_window_softcap_and_scale(dtype: torch.dtype, options: AttentionOptions) -> None:
    """In a tree, a window counts the slots of the row's branch, not those of other branches."""
    q = normal(8, 4, 32, dtype=dtype)
    keys, values = normal(2, 30, 32, dtype=dtype), normal(2, 30, 32, dtype=dtype).flip(1)
    chain = torch.ones(8, 8, dtype=torch.bool).tril()
    tree = definitions.ancestors([-1, 0, 0, 1, 2, 2, 5, 4])
    for mask in (chain, tree):
        expected = definitions.block_attention(q, keys, values, 11, mask, options)
        assert not torch.allclose(expected, definitions.block_attention(q, keys, values, 11, mask)) or (
            options.window == 30
        )
        found = block_attention.OP.plain(q, keys, values, torch.tensor([11]), mask, options)
        assert_close(found, expected, dtype)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"softcap": -1.0}, {"scale": 0.0}, {"scale": float("nan")}])
def test_options_of_attention_are_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a positive number or None"):
        AttentionOptions(**wrong)  # type: ignore[arg-type]


def test_gradients_pass_through_a_fresh_cache() -> None:
    """The gradient of attention over what the block itself wrote, against finite differences."""
    with torch.inference_mode(False), torch.enable_grad():
        angles = normal(3, 2).repeat(1, 2).double()
        start, mask = torch.zeros(1, dtype=torch.int64), torch.ones(3, 3, dtype=torch.bool).tril()

        def attended(qkv: Tensor) -> Tensor:
            keys, values = qkv.new_empty(1, 3, 4), qkv.new_empty(1, 3, 4)
            q = rotary_write.rotary_write(qkv, angles.cos(), angles.sin(), keys, values, start)
            return block_attention.block_attention(q, keys, values, start, mask)

        qkv = normal(3, 4 * 4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(attended, qkv, eps=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", LAYER_OPS, ids=lambda op: op.name)
def test_triton_takes_16_bit_and_short_blocks_alone(op: LayerOp) -> None:
    """Results are compared exactly in float32, and long blocks are prompts, so Triton computes neither."""
    if op.triton is None:
        pytest.skip("it has no kernel in Triton")
    pytest.importorskip("triton")
    for dtype, takes in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        setting = Setting(SMALL, rows=3, context=7, dtype=dtype, device=torch.device("cpu"), group_size=None)
        assert op.triton.supports(*op.case(setting).arguments) == takes
    if op is block_attention.OP:
        setting = Setting(SMALL, rows=65, context=7, dtype=torch.bfloat16, device=torch.device("cpu"), group_size=None)
        assert not op.triton.supports(*op.case(setting).arguments)


def test_the_compiler_sees_pytorchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(lambda *arguments: True, lambda *arguments: "kernel")
    op = Op("test", lambda *arguments: "plain", kernel, kernel)
    monkeypatch.setattr(dispatch, "backend", object)
    monkeypatch.setattr(dispatch, "has_gpu_kernels", lambda rows: True)
    assert op(torch.zeros(1)) == op(Elsewhere()) == "kernel"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert op(torch.zeros(1)) == op(Elsewhere()) == "plain"
