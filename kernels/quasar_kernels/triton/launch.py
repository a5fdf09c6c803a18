"""The launch of a matmul kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import JITFunction

from quasar_kernels.triton.split_k import Workspace
from quasar_kernels.triton.tuning import Tiling


def launch(
    kernel: JITFunction,
    operands: Sequence[Tensor | float | None],
    out: Tensor,
    tiling: Tiling,
    sums: torch.dtype = torch.float32,
    /,
    **constants: int,
) -> Tensor:
    """Run a matmul kernel and return ``out`` [M, N].

    kernel: takes the operands, ``out``, the partial sums and counters of split-K, M, N and K
    operands: the first are activations [M, K]; None for one that the constants tell the kernel not to read
    sums: dtype of the partial sums; constants: the compile-time values of the kernel besides `Tiling.sizes`
    """
    activations = operands[0]
    assert isinstance(activations, Tensor)
    rows, outputs = out.shape
    partials, counters = Workspace.of(out.device).reserve(*tiling.workspace(rows, outputs), sums)
    kernel[tiling.grid(rows, outputs)](
        *(activations if operand is None else operand for operand in operands),
        out,
        partials,
        counters,
        rows,
        outputs,
        activations.shape[1],
        **constants,
        **tiling.sizes,
        **tiling.options,
    )
    return out
