"""The compiled library of this machine's level."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quasar_kernels.cpu.build import BuildError, library_path
from quasar_kernels.cpu.functions import FUNCTIONS
from quasar_kernels.cpu.levels import Level, chosen_levels

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32)
ACTIVATIONS_BFLOAT16 = 1
BIAS_BFLOAT16 = 2
ACTIVATIONS_INT8 = 4
HUGE_PAGE_BYTES = 2 << 20

MatmulFunction = Callable[[int, int, int | None, int, int | None, int, int, int], None]


class Library:
    """The functions of one level, with one attribute for each function in `functions.h`.

    They are called directly through ctypes, because an operator of `torch.library` would add several microseconds to
    each call.
    """

    def __init__(self, path: Path, level: Level) -> None:
        self.level = level
        self._library = ctypes.CDLL(str(path))
        for name, signature in FUNCTIONS.items():
            setattr(self, name, self._function(f"quasar_{name}", *signature.arguments))
        self.replay = self._function("quasar_replay", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

    if TYPE_CHECKING:

        def __getattr__(self, function: str) -> Callable[..., None]: ...

    def replayed(self, name: str) -> int:
        """Return the address of the function that executes a recorded call of a kernel."""
        address = ctypes.cast(getattr(self._library, f"replay_{name}"), ctypes.c_void_p).value
        assert address is not None
        return address

    def ask_for_huge_pages(self, memory: Tensor) -> None:
        """Request huge pages for a large tensor that has not been written yet."""
        if memory.nbytes >= HUGE_PAGE_BYTES:
            self.advise_huge_pages(memory.data_ptr(), memory.nbytes)

    def _function(self, name: str, *arguments: type) -> Callable[..., None]:
        function = getattr(self._library, name)
        function.argtypes = arguments
        function.restype = None
        return function


_forced_level: str | None = None


def use_level(name: str | None) -> None:
    """Use the kernels of the named level from now on; "torch" means no kernels, and None the default level.

    The default is the level in `QUASAR_CPU_LEVEL`, or else the best one. Packed weights are the same for all levels.
    Raises ValueError if this processor has no level of that name.
    """
    global _forced_level
    chosen_levels(name)
    _forced_level = name
    backend.cache_clear()


@functools.cache
def backend() -> Library | None:
    """Return the library of this machine's level, or None if PyTorch's operations compute everything.

    It is compiled on first use. Warns once if this fails. Raises ValueError if `QUASAR_CPU_LEVEL` names an unknown
    level.
    """
    return _loaded(chosen_levels(_forced_level))


@functools.cache
def _loaded(levels: tuple[Level, ...]) -> Library | None:
    reasons = []
    for level in levels:
        # A compiler may be too old for the best level, but support the next one.
        try:
            return Library(library_path(level), level)
        except (BuildError, OSError) as error:
            reasons.append(error)
    if reasons:
        message = f"CPU kernels are off, PyTorch's operations are used: {reasons[-1]}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return None
