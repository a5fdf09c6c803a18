"""The compiled library and the one way of calling it."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.cpu.build import BuildError, library_path
from kernels.cpu.levels import Level, chosen_level

if TYPE_CHECKING:
    from kernels.cpu.packing import PackedWeight

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32)
ACTIVATIONS_BFLOAT16 = 1
BIAS_BFLOAT16 = 2
HUGE_PAGE_BYTES = 2 << 20

Product = Callable[[int, int, int, int | None, int, int, int], None]


class Library:
    """The products of one level. Calls go through ctypes directly: a custom op adds several microseconds to each."""

    def __init__(self, path: Path, level: Level) -> None:
        self.level = level
        self._library = ctypes.CDLL(str(path))
        self.linear_w8a8 = self._product("quasar_linear_w8a8")
        self.linear_w4a8 = self._product("quasar_linear_w4a8")
        self.linear_w4a16 = self._product("quasar_linear_w4a16")
        self.linear_bf16 = self._product("quasar_linear_bf16")
        self.linear_f32 = self._product("quasar_linear_f32")
        self._advise_huge_pages = self._library.quasar_advise_huge_pages
        self._advise_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._advise_huge_pages.restype = None

    def advise_huge_pages(self, memory: Tensor) -> None:
        """Ask for huge pages below a large tensor that has not been written yet."""
        if memory.nbytes >= HUGE_PAGE_BYTES:
            self._advise_huge_pages(memory.data_ptr(), memory.nbytes)

    def _product(self, name: str) -> Product:
        function = getattr(self._library, name)
        function.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
        function.restype = None
        return function


@functools.cache
def backend() -> Library | None:
    """The library of this machine's level, compiled on first use; None where PyTorch's operations must do.

    Warns once if the kernels cannot be compiled. Raises ValueError if `QUASAR_CPU_LEVEL` names an unknown level.
    """
    level = chosen_level()
    if level is None:
        return None
    try:
        return Library(library_path(level), level)
    except (BuildError, OSError) as error:
        warnings.warn(f"CPU kernels are off, PyTorch's operations are used: {error}", RuntimeWarning, stacklevel=2)
        return None


def multiply(product: Product, weight: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` with one of a library's products.

    x: bfloat16 or float32 [M, K] on the CPU; bias: bfloat16 or float32 [N]. Returns [M, N] in the dtype of x.
    Raises ValueError for other shapes, dtypes or devices: the library itself checks nothing.
    """
    if x.dim() != 2 or x.shape[1] != weight.inputs or x.dtype not in ACTIVATION_DTYPES or x.device.type != "cpu":
        raise ValueError(
            f"expected bfloat16 or float32 [M, {weight.inputs}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}"
        )
    flags = ACTIVATIONS_BFLOAT16 if x.dtype == torch.bfloat16 else 0
    if not x.is_contiguous():
        x = x.contiguous()
    bias_pointer = None
    if bias is not None:
        if bias.shape != (weight.outputs,) or bias.dtype not in ACTIVATION_DTYPES or bias.device.type != "cpu":
            raise ValueError(
                f"expected a bias [{weight.outputs}] in bfloat16 or float32 on the CPU, got {bias.dtype} "
                f"{list(bias.shape)} on {bias.device}"
            )
        bias = bias.contiguous()
        bias_pointer = bias.data_ptr()
        if bias.dtype == torch.bfloat16:
            flags |= BIAS_BFLOAT16
    out = x.new_empty((x.shape[0], weight.outputs))
    product(weight.address, x.data_ptr(), out.data_ptr(), bias_pointer, x.shape[0], flags, torch.get_num_threads())
    return out
