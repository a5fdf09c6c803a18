"""The ops that the model's forward pass is made of, where PyTorch's operations have to compute them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import quasar_kernels
import torch
from quasar_kernels import Quantized, block_ops, reference
from torch import Tensor

from tests.test_kernels_cpu import DTYPES, int4_weight, int8_weight, level, normal, relative_error

__all__ = ["level"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "context", "capacity"), [(1, 0, 1), (5, 7, 12), (5, 7, 40), (130, 20, 150)])
def test_attention_of_a_block(level: str, dtype: torch.dtype, rows: int, context: int, capacity: int) -> None:
    """Every row sees the context and what its mask says, and nothing behind the block."""
    q = normal(rows, 4, 32, dtype=dtype)
    keys, values = (normal(2, capacity, 32, seed=seed, dtype=dtype) for seed in (1, 2))
    mask = torch.rand(rows, rows, generator=torch.Generator().manual_seed(3)) < 0.5
    mask.fill_diagonal_(True)
    start = torch.tensor([context])
    expected = reference.block_attention(q, keys, values, start, mask)
    for given in (mask, mask.long()):  # captured passes keep it beside their other integers
        found = block_ops.block_attention(q, keys, values, start, given)
        assert relative_error(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_gradients_pass_through_a_fresh_cache() -> None:
    """The gradient of attention over what the block itself wrote, against finite differences."""
    angles = normal(3, 2).repeat(1, 2).double()
    start, mask = torch.zeros(1, dtype=torch.int64), torch.ones(3, 3, dtype=torch.bool).tril()

    def attended(qkv: Tensor) -> Tensor:
        keys, values = qkv.new_empty(1, 3, 4), qkv.new_empty(1, 3, 4)
        q = block_ops.rotary_write_at(qkv, angles.cos(), angles.sin(), keys, values, start)
        return block_ops.block_attention(q, keys, values, start, mask)

    # Rotation computes in float32, hence the wide steps.
    qkv = normal(3, 4 * 4).double().requires_grad_()
    assert torch.autograd.gradcheck(attended, qkv, eps=1e-2, atol=1e-3)


@pytest.mark.parametrize(("grad", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_gpu_kernels_are_left_out(monkeypatch: pytest.MonkeyPatch, grad: bool, dtype: torch.dtype) -> None:
    """They know no gradients, and float32 is the mode in which results are compared exactly."""

    class Kernels:
        MAX_ROWS = 64

        def __getattr__(self, name: str) -> Callable[..., str]:
            return lambda *_: name

    monkeypatch.setattr(block_ops, "gpu_backend", lambda x: Kernels())
    monkeypatch.setattr(block_ops, "backend", lambda: None)
    x, start = torch.ones(2, 32, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    cache = torch.zeros(2, 1, 2, 8, dtype=dtype)
    mask = torch.ones(2, 2, dtype=torch.bool)
    calls: list[Callable[[], object]] = [
        lambda: block_ops.add_rms_norm(x, x[0], 1e-5),
        lambda: block_ops.add_rms_norm_quantize(x, x[0], 1e-5),
        lambda: block_ops.silu_mul(x),
        lambda: block_ops.silu_mul_quantize(x),
        lambda: block_ops.rotary_write_at(x, x[:, :8].float(), x[:, :8].float(), *cache, start),
        lambda: block_ops.block_attention(x.view(2, 4, 8), *cache, start, mask),
        lambda: block_ops.linear_dense(x, x, None),
    ]
    with torch.set_grad_enabled(grad):
        assert not any(isinstance(call(), str) for call in calls)
    x = x.bfloat16()
    cache = cache.bfloat16()
    with torch.no_grad():
        assert all(isinstance(call(), str) for call in calls)
        # Blocks that are no drafts but prompts are PyTorch's: the kernel would split the context for each of them.
        long = block_ops.block_attention(x.view(2, 4, 8).repeat(33, 1, 1), *cache, start, torch.ones(66, 66))
        assert isinstance(long, Tensor)


def test_float16_activations_that_are_quantized_already(level: str) -> None:
    x = normal(5, 96).half()
    int8, int4 = int8_weight(64, 96), int4_weight(64, 96, 32, "integer", torch.float16)
    found = quasar_kernels.linear_w8a8(Quantized(*reference.quantize_tokens(x), x.dtype), int8)
    assert found.dtype == torch.float16
    assert torch.equal(found, quasar_kernels.linear_w8a8(x, int8))
    found = quasar_kernels.linear_w4a8(Quantized(*reference.quantize_tokens(x, 32), x.dtype), int4)
    assert found.dtype == torch.float16
    assert torch.equal(found, quasar_kernels.linear_w4a8(x, int4))
