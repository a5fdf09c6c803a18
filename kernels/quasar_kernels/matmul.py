"""The common parts of all matmuls, ``x W^T + bias`` with weights of some format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cpu.calls import multiply
from quasar_kernels.cpu.library import ACTIVATION_DTYPES, Library
from quasar_kernels.dispatch import Kernel, Op
from quasar_kernels.reference import quantize_tokens
from quasar_kernels.weights import DenseWeight, Fp8Weight, GroupInt8Weight, Int4Weight, Int8Weight, Quantized

Weight = DenseWeight | Int8Weight | GroupInt8Weight | Int4Weight | Fp8Weight


@dataclass(frozen=True)
class Matmul(Op):
    """An op of the form (x, weight, bias).

    weight_bits: stored bits of a weight, without its scale
    activations: "float" if the op does not quantize them; "int8" or "fp8" if it quantizes per token, "int8 groups" in
        groups. Those in FP8 are never quantized by the op before
    round: rounds a float matrix [N, K] to the op's format; takes the matrix and a group size, which some formats ignore
    """

    weight_bits: int = field(kw_only=True)
    activations: Literal["float", "int8", "int8 groups", "fp8"] = "float"
    round: Callable[[Tensor, int], Weight] = field(kw_only=True)

    @property
    def format(self) -> str:
        """The short name with the bits of weights and activations, such as w4a16."""
        return self.name.removeprefix("linear_")

    def bits(self, group_size: int) -> float:
        """Return the stored bits per weight, with the 16-bit scales of groups."""
        return self.weight_bits + (16 / group_size if self.weight_bits == 4 else 0)

    def quantized(self, x: Tensor, group_size: int) -> Tensor | Quantized:
        """Quantize x as the op before this one does, or return x if this op takes floats."""
        if self.activations in ("float", "fp8"):
            return x
        return as_quantized(x, group_size if self.activations == "int8 groups" else None)


def as_quantized(x: Tensor | Quantized, group_size: int | None = None) -> Quantized:
    """Quantize activations per token or per group with PyTorch's operations, unless they are quantized already."""
    return x if isinstance(x, Quantized) else Quantized(*quantize_tokens(x, group_size), x.dtype)


def cpu_matmul(function: str) -> Kernel:
    """Return the kernel of the compiled library with this name. Float16 activations are widened to float32 for it."""

    def supports(x: Tensor | Quantized, weight: Weight, bias: Tensor | None = None) -> bool:
        return weight.packed_for_cpu is not None

    def run(library: Library, x: Tensor | Quantized, weight: Weight, bias: Tensor | None = None) -> Tensor:
        packed = weight.packed_for_cpu
        assert packed is not None
        if x.dtype not in ACTIVATION_DTYPES:
            wide = x._replace(dtype=torch.float32) if isinstance(x, Quantized) else x.float()
            return run(library, wide, weight, None if bias is None else bias.float()).to(x.dtype)
        if isinstance(x, Quantized):
            return multiply(getattr(library, function), packed, x.values, bias, x.scales, x.dtype)
        return multiply(getattr(library, function), packed, x, bias)

    return Kernel(supports, run)


def triton_matmul(
    run: Callable[..., Tensor],
    group_sizes: tuple[int, ...] | None = None,
    device_takes: Callable[[torch.device], bool] = lambda device: True,
) -> Kernel:
    """Return a Triton kernel of a matmul, for few rows that can be read 16 bytes at a time.

    run: takes x, weight, bias and optionally a tiling
    group_sizes: the group sizes that it takes, 0 for none; None if the weights have no groups
    device_takes: whether a GPU has the instructions that it needs

    PyTorch computes float32, because results are compared exactly in float32.
    """

    def supports(x: Tensor | Quantized, weight: Weight | Tensor, bias: Tensor | None = None) -> bool:
        from quasar_kernels.triton.tuning import ACTIVATION_DTYPES, INPUTS_MULTIPLE, MAX_ROWS

        rows = x.values if isinstance(x, Quantized) else x
        return (
            rows.dtype in ACTIVATION_DTYPES
            and len(rows) <= MAX_ROWS
            and rows.shape[1] % INPUTS_MULTIPLE == 0
            and device_takes(rows.device)
            and (group_sizes is None or getattr(weight, "group_size", None) in group_sizes)
        )

    def checked(x: Tensor | Quantized, weight: Weight | Tensor, *others: Any) -> Tensor:
        checks.matmul(x, weight, *others)
        return run(x, weight, *others)

    return Kernel(supports, checked)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values are summed: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
