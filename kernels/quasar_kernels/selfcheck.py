"""Compares the kernels of this machine with PyTorch's own operations, for every op of the table, in a second or two."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quasar_kernels.cases import Layer, Setting
from quasar_kernels.cpu.library import backend
from quasar_kernels.dispatch import LayerOp, Op
from quasar_kernels.gpu import has_gpu_kernels
from quasar_kernels.matmul import Matmul
from quasar_kernels.ops import LAYER_OPS, MATMULS
from quasar_kernels.slots import QuantizedSlots

TOLERANCE = 3 * 2**-7
"""Largest difference relative to the largest value of a row: bfloat16 has 8 bits, and norms round three times."""
QUANTIZATION_STEP = 1 / 127
"""Two quantizers may round a value between two steps to different steps."""
_LAYER = Layer(128, 192, 4, 2, 32, True, 112)
_ROWS, _CONTEXT, _GROUP_SIZE, _OUTPUTS = 3, 5, 64, 48


@dataclass(frozen=True)
class Comparison:
    """An op's kernel compared with PyTorch's operations.

    error: largest difference relative to the largest value of a row; None if no kernel computes the op here
    failure: what the kernel raised, if it did
    """

    op: str
    error: float | None = None
    failure: str | None = None

    @property
    def correct(self) -> bool:
        return self.failure is None and (self.error is None or self.error <= TOLERANCE)


def compare_kernels(device: torch.device) -> Iterator[Comparison]:
    """Compare every op on random bfloat16 values with a fixed seed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(0)
        for op in (*MATMULS, *LAYER_OPS):
            try:
                yield Comparison(op.name, _error(op, _arguments(op, device)))
            except Exception as error:  # a kernel may fail in any way, and the others may still be right
                yield Comparison(op.name, failure=f"{type(error).__name__}: {error}"[:200])


def _arguments(op: Matmul | LayerOp, device: torch.device) -> tuple[Any, ...]:
    setting = Setting(_LAYER, _ROWS, _CONTEXT, _GROUP_SIZE, device)
    if isinstance(op, LayerOp):
        return op.case(setting).arguments
    weight = op.round(setting.normal(_OUTPUTS, _LAYER.hidden), _GROUP_SIZE)
    return setting.normal(_ROWS, _LAYER.hidden), weight, setting.normal(_OUTPUTS)


def _error(op: Op, arguments: tuple[Any, ...]) -> float | None:
    copies = tuple(copy.deepcopy(one) if isinstance(one, Tensor | QuantizedSlots) else one for one in arguments)
    computed = _kernel_result(op, arguments)
    if computed is None:
        return None
    # An op may write to its arguments, as the one that fills the KV cache does.
    found = [*_tensors(computed), *_tensors(arguments)]
    expected = [*_tensors(op.plain(*copies)), *_tensors(copies)]
    return max([*_differences(found, expected), *_slot_differences(arguments, copies)])


def _kernel_result(op: Op, arguments: tuple[Any, ...]) -> Any:
    """Return what the device's kernel computes; None if there is none for these arguments."""
    if arguments[0].is_cpu:
        library = backend()
        if library is None or op.cpu is None or not op.cpu.supports(*arguments):
            return None
        return op.cpu.run(library, *arguments)
    if op.triton is None or not has_gpu_kernels(arguments[0]) or not op.triton.supports(*arguments):
        return None
    return op.triton.run(*arguments)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, Tensor)]


def _differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Iterator[float]:
    """Yield the largest difference of each pair. Quantized values are multiplied by their scales, which follow them."""
    pairs = iter(zip(found, expected, strict=True))
    for ours, theirs in pairs:
        slack = 0.0
        if ours.dtype == torch.int8:
            scales, their_scales = next(pairs)
            ours, theirs, slack = _restored(ours, scales), _restored(theirs, their_scales), QUANTIZATION_STEP
        yield _difference(ours, theirs) - slack


def _slot_differences(found: Sequence[Any], expected: Sequence[Any]) -> Iterator[float]:
    """Yield the largest difference of each pair of quantized keys or values."""
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, QuantizedSlots):
            yield _difference(ours.dequantized(torch.float32), theirs.dequantized(torch.float32)) - ours.largest_step


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if not ours.double().isfinite().all():
        return float("inf")
    size = theirs.double().abs().amax(-1, keepdim=True).clamp_min(1e-9)
    return float(((ours.double() - theirs.double()).abs() / size).max())


def _restored(values: Tensor, scales: Tensor) -> Tensor:
    return (values.double().view(*scales.shape, -1) * scales.double().unsqueeze(2)).view(values.shape)
