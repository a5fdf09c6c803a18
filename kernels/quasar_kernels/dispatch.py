"""Chooses the backend that computes an op. No other module chooses by a tensor's device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu.library import backend
from quasar_kernels.gpu import has_gpu_kernels
from quasar_kernels.weights import Quantized


@dataclass(frozen=True)
class Kernel:
    """The kernel of one backend for an op.

    supports: whether the kernel takes these arguments, which are on a device of the backend
    run: computes the op from the same arguments
    """

    supports: Callable[..., bool]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """An op and its backends. All take the same arguments; the device of the first argument decides.

    plain: PyTorch's own operations. They define the op, and compute it for every device, dtype and size without a
        kernel. They compute float64 arguments in float64, so that the kernels can be compared with them
    cpu: the compiled library's kernel, whose ``run`` takes the `Library` before the arguments
    triton: the kernel for CUDA, whose ``run`` imports Triton; None if PyTorch's operations are used there
    differentiable: whether gradients may flow through the op. Kernels have no gradients, so PyTorch's operations
        compute the op where gradients are recorded
    check: raises ValueError for arguments with which a kernel would access memory outside of them

    Under ``torch.compile`` PyTorch's operations compute every op, so that the compiler sees them.
    """

    name: str
    plain: Callable[..., Any]
    cpu: Kernel | None
    triton: Kernel | None
    differentiable: bool = True
    check: Callable[..., None] = field(kw_only=True, default=lambda *arguments: None)

    def __call__(self, *arguments: Any) -> Any:
        first = arguments[0]
        rows = first.values if isinstance(first, Quantized) else first
        if not (self.differentiable and torch.is_grad_enabled()) and not torch.compiler.is_compiling():
            if rows.is_cpu:
                cpu = self.cpu
                if cpu is not None and cpu.supports(*arguments) and (library := backend()) is not None:
                    self.check(*arguments)
                    return cpu.run(library, *arguments)
            elif self.triton is not None and has_gpu_kernels(rows) and self.triton.supports(*arguments):
                self.check(*arguments)
                return self.triton.run(*arguments)
        return self.plain(*arguments)


@dataclass(frozen=True)
class LayerOp(Op):
    """An op between the matmuls.

    case: returns arguments to measure and check it with
    reads_cache: whether it reads the cached context, so that its time depends on the length
    """

    case: Callable[[Setting], Case] = field(kw_only=True)
    reads_cache: bool = False


def in_16_bit(x: torch.Tensor, *others: Any) -> bool:
    """Return whether x is in 16 bit. Triton kernels do not take float32, in which results are compared exactly."""
    return x.dtype in (torch.bfloat16, torch.float16)


def triton_function(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module of `quasar_kernels.triton`. The first call imports the module."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"quasar_kernels.triton.{module}"), name)(*arguments)

    return run


def triton_groups(group_size: int | None) -> bool:
    """Return whether the Triton kernels quantize groups of this size: a power of two, or the whole row."""
    return group_size is None or group_size & (group_size - 1) == 0
