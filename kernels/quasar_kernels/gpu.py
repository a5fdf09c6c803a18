"""The Triton kernels, where there is a GPU that they serve."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from quasar_kernels.weights import Int4Weight

if TYPE_CHECKING:
    from quasar_kernels.triton.int4_packing import PackedInt4


def gpu_backend(x: Tensor) -> ModuleType | None:
    """`triton.ops` for tensors on a GPU that it has kernels for, where Triton is installed; else None."""
    ops = _triton_ops() if x.is_cuda else None
    return ops if ops is not None and ops.capable(x.device) else None


def packed_for_gpu(weight: Int4Weight) -> PackedInt4:
    """The weight as the Triton kernels read it."""
    ops = _triton_ops()
    assert ops is not None
    return ops.packed_int4(weight, *weight.canonical())


@functools.cache
def _triton_ops() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from quasar_kernels.triton import ops

    return ops
