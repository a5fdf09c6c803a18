"""The compiled library and the one way of calling it."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quasar_kernels.cpu.build import BuildError, library_path
from quasar_kernels.cpu.levels import Level, chosen_levels

if TYPE_CHECKING:
    from quasar_kernels.cpu.packing import PackedWeight

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32)
ACTIVATIONS_BFLOAT16 = 1
BIAS_BFLOAT16 = 2
ACTIVATIONS_INT8 = 4
HUGE_PAGE_BYTES = 2 << 20

Product = Callable[[int, int, int | None, int, int | None, int, int, int], None]

_POINTER, _SIZE, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Signature(NamedTuple):
    """Argument types of a function of the library, and which argument is the number of rows."""

    arguments: tuple[type, ...]
    rows: int


_PRODUCT = Signature((*[_POINTER] * 5, _SIZE, _INT32, _INT32), rows=5)
KERNELS = {
    "linear_w8a8": _PRODUCT,
    "linear_w8a16": _PRODUCT,
    "linear_w4a8": _PRODUCT,
    "linear_w4a16": _PRODUCT,
    "linear_bf16": _PRODUCT,
    "linear_f32": _PRODUCT,
    "rms_norm": Signature((*[_POINTER] * 7, *[_SIZE] * 3, _FLOAT, _INT32), rows=7),
    "silu_mul": Signature((*[_POINTER] * 4, *[_SIZE] * 3, _INT32), rows=4),
    "rotary_write": Signature((*[_POINTER] * 9, *[_SIZE] * 5, _FLOAT, _INT32), rows=9),
    "attention": Signature((*[_POINTER] * 6, *[_SIZE] * 6, _INT32), rows=6),
}
"""The functions of exports.h that work on rows."""


class Library:
    """The functions of one level. Calls go through ctypes directly: a custom op adds several microseconds to each."""

    linear_w8a8: Product
    linear_w8a16: Product
    linear_w4a8: Product
    linear_w4a16: Product
    linear_bf16: Product
    linear_f32: Product
    rms_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    rotary_write: Callable[..., None]
    attention: Callable[..., None]

    def __init__(self, path: Path, level: Level) -> None:
        self.level = level
        self._library = ctypes.CDLL(str(path))
        for name, signature in KERNELS.items():
            setattr(self, name, self._function(f"quasar_{name}", *signature.arguments))
        self.first_maxima = self._function("quasar_first_maxima", _POINTER, _POINTER, _SIZE, _SIZE, _INT32)
        self.replay = self._function("quasar_replay", _POINTER, _SIZE, _SIZE)
        self._advise_huge_pages = self._function("quasar_advise_huge_pages", _POINTER, _SIZE)

    def replayed(self, name: str) -> int:
        """Address of the function that makes a recorded call of a kernel."""
        address = ctypes.cast(getattr(self._library, f"replay_{name}"), ctypes.c_void_p).value
        assert address is not None
        return address

    def advise_huge_pages(self, memory: Tensor) -> None:
        """Ask for huge pages below a large tensor that has not been written yet."""
        if memory.nbytes >= HUGE_PAGE_BYTES:
            self._advise_huge_pages(memory.data_ptr(), memory.nbytes)

    def _function(self, name: str, *arguments: type) -> Callable[..., None]:
        function = getattr(self._library, name)
        function.argtypes = arguments
        function.restype = None
        return function


_forced_level: str | None = None


def use_level(name: str | None) -> None:
    """Use the kernels of the named level from now on, "torch" for none, None for what `QUASAR_CPU_LEVEL` or the
    processor says. Weights that are packed already serve every level.

    Raises ValueError if the name is no level, or one that this processor does not have.
    """
    global _forced_level
    chosen_levels(name)
    _forced_level = name
    backend.cache_clear()


@functools.cache
def backend() -> Library | None:
    """The library of this machine's level, compiled on first use; None where PyTorch's operations must do.

    Warns once if the kernels cannot be compiled. Raises ValueError if `QUASAR_CPU_LEVEL` names an unknown level.
    """
    return _loaded(chosen_levels(_forced_level))


@functools.cache
def _loaded(levels: tuple[Level, ...]) -> Library | None:
    reasons = []
    for level in levels:
        # A compiler may be too old for the best level and good enough for the next.
        try:
            return Library(library_path(level), level)
        except (BuildError, OSError) as error:
            reasons.append(error)
    if reasons:
        message = f"CPU kernels are off, PyTorch's operations are used: {reasons[-1]}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return None


def multiply(
    product: Product,
    weight: PackedWeight,
    x: Tensor,
    bias: Tensor | None,
    token_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x W^T + bias`` with one of a library's products.

    x: bfloat16 or float32 [M, K] on the CPU, or int8 with float32 ``token_scales`` [M, G] (one for int8 weights, else
    one for each of the weight's groups) and the ``dtype`` of the result; bias: bfloat16 or float32 [N].
    Returns [M, N] in the dtype of x.
    Raises ValueError for other shapes, dtypes or devices: the library itself checks nothing.
    """
    if dtype is None:
        dtype = x.dtype
    flags = ACTIVATIONS_BFLOAT16 if dtype == torch.bfloat16 else 0
    scales_pointer = bias_pointer = None
    valid = x.dim() == 2 and x.shape[1] == weight.inputs and dtype in ACTIVATION_DTYPES and x.device.type == "cpu"
    if token_scales is not None:
        token_scales = token_scales.contiguous()
        scales_pointer = token_scales.data_ptr()
        flags |= ACTIVATIONS_INT8
        groups = weight.inputs // (weight.group_size or weight.inputs)
        valid = valid and x.dtype == torch.int8 and token_scales.dtype == torch.float32
        valid = valid and token_scales.shape == (len(x), groups)
    if not valid:
        raise ValueError(
            f"expected bfloat16, float32 or scaled int8 [M, {weight.inputs}] on the CPU, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    if not x.is_contiguous():
        x = x.contiguous()
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
    rows = x.shape[0]
    out = torch.empty((rows, weight.outputs), dtype=dtype)
    product(
        weight.address, x.data_ptr(), scales_pointer, out.data_ptr(), bias_pointer, rows, flags, torch.get_num_threads()
    )
    return out
