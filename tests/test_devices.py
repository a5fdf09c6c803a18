"""The behaviour of the ops for tensors on other devices, as far as it can be tested on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import quasar_kernels
import torch
from quasar_kernels import DenseWeight, Int8Weight, dispatch, reference
from torch.utils._python_dispatch import TorchDispatchMode


class NoDivisionByNumber(TorchDispatchMode):
    """CUDA divides by a constant by multiplying by its rounded reciprocal."""

    divisions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.div:
            self.divisions += 1
            assert isinstance(args[1], torch.Tensor), "divided by a number"
            assert args[1].dim() > 0, "divided by a number"
        return func(*args, **(kwargs or {}))


def test_quantization_divides_exactly_on_every_device() -> None:
    x = torch.tensor([[2.0, 1.0, -1.0, 0.25], [0.0, 0.0, 0.0, 0.0]])
    with NoDivisionByNumber() as mode:
        values, scales = reference.quantize_tokens(x)
    assert mode.divisions == 2
    assert scales.tolist() == [[torch.tensor(2.0).div(127).item()], [1.0]]
    # Half the largest value is a tie, 63.5, up to the rounding of the scale.
    assert values.tolist() == [[127, 64, -64, 16], [0, 0, 0, 0]]


def test_the_cpu_kernels_are_not_compiled_for_tensors_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_now() -> None:
        raise AssertionError("the CPU kernels were asked for")

    monkeypatch.setattr(dispatch, "backend", compile_now)
    x = torch.empty(96, 64, dtype=torch.bfloat16, device="meta")
    int8 = Int8Weight(torch.empty(32, 64, dtype=torch.int8, device="meta"), torch.empty(32, device="meta"))
    dense = DenseWeight(torch.empty(32, 64, dtype=torch.bfloat16, device="meta"))
    assert quasar_kernels.linear_w8a8(x, int8).shape == (96, 32)
    assert quasar_kernels.linear_bf16(x, dense).shape == (96, 32)
