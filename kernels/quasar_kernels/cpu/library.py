"""The compiled library of this machine's level."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quasar_kernels.cpu.build import BuildError, library_path
from quasar_kernels.cpu.functions import FUNCTIONS
from quasar_kernels.cpu.levels import LEVEL_VARIABLE, NO_KERNELS, Level, chosen_levels

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

    It is compiled on first use. Warns once if the best level cannot be used. Raises ValueError if `QUASAR_CPU_LEVEL`
    names an unknown level.
    """
    return _loaded(chosen_levels(_forced_level)).library


def kernel_level() -> tuple[str, str]:
    """The name of the level in use, "torch" for none, and the reason why it is this one, in a few words."""
    found = backend()
    levels = chosen_levels(_forced_level)
    if failures := _loaded(levels).failures:
        reason = "; ".join(f"{name} is off: {error}" for name, error in failures)
    elif named := _forced_level or os.environ.get(LEVEL_VARIABLE):
        reason = f"{LEVEL_VARIABLE}={named}" if _forced_level is None else "chosen by the caller"
    else:
        reason = "the best of this processor" if levels else "this processor has no AVX2"
    return NO_KERNELS if found is None else found.level.name, reason


class _Loaded(NamedTuple):
    """The library that could be loaded, and the better levels that could not, with the reasons."""

    library: Library | None
    failures: tuple[tuple[str, str], ...]


@functools.cache
def _loaded(levels: tuple[Level, ...]) -> _Loaded:
    failures: list[tuple[str, str]] = []
    found = None
    for level in levels:
        # A compiler may be too old for the best level, but support the next one.
        try:
            found = Library(library_path(level), level)
            break
        except (BuildError, OSError) as error:
            failures.append((level.name, str(error)))
    if failures:
        used = "CPU kernels are off, PyTorch's operations are used"
        if found is not None:
            used = f"CPU kernels of level {failures[0][0]} are off, those of level {found.level.name} are used"
        warnings.warn(f"{used}: {failures[-1][1]}", RuntimeWarning, stacklevel=3)
    return _Loaded(found, tuple(failures))
