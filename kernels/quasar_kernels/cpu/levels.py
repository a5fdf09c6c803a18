"""ISA levels that the kernels are compiled for."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

LEVEL_VARIABLE = "QUASAR_CPU_LEVEL"


@dataclass(frozen=True)
class Level:
    """An ISA level.

    name: its name in `QUASAR_CPU_LEVEL`
    features: the names of the required processor features in Linux
    flags: the flags of the compiler
    """

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")


_AVX512_BF16 = (*_AVX512, "avx512_bf16")
_TILES = ("amx_tile", "amx_int8", "amx_bf16")


def _level(name: str, *features: str, options: tuple[str, ...] = ()) -> Level:
    return Level(name, frozenset(features), (*map(_flag, features), *options))


def _flag(feature: str) -> str:
    """Return the flag of GCC and Clang for a feature, given its name in Linux."""
    return f"-m{feature.replace('_', '-' if feature.startswith('amx') else '')}"


EMULATED = "amx-emulated"
# From best to worst. The last one computes the same as `amx` without its instructions, for tests on other processors.
LEVELS = (
    _level("amx", *_AVX512_BF16, *_TILES),
    _level("avx512bf16", *_AVX512_BF16),
    _level("avx512", *_AVX512),
    _level("avx2", *_AVX2),
    _level(EMULATED, *_AVX512_BF16, options=("-DEMULATED_TILES",)),
)
NO_KERNELS = "torch"
CPUINFO = Path("/proc/cpuinfo")


def available_levels() -> tuple[Level, ...]:
    """Return the levels that this processor and its operating system support, from best to worst."""
    features = _processor_features()
    return tuple(level for level in LEVELS if level.features <= features)


def chosen_levels(name: str | None = None) -> tuple[Level, ...]:
    """Return the named level, or the one that `QUASAR_CPU_LEVEL` names, or all usable levels from best to worst.

    An empty result means PyTorch's own operations. Raises ValueError if this processor has no level of that name.
    """
    available = available_levels()
    wanted = name or os.environ.get(LEVEL_VARIABLE)
    if not wanted:
        return tuple(level for level in available if level.name != EMULATED)
    if wanted == NO_KERNELS:
        return ()
    for level in available:
        if level.name == wanted:
            return (level,)
    choices = ", ".join([*(level.name for level in available), NO_KERNELS])
    source = "" if name else f"{LEVEL_VARIABLE}="
    raise ValueError(f"{source}{wanted}: no level of CPU kernels here; this processor has {choices}")


def _processor_features() -> frozenset[str]:
    # Linux lists a feature only if the operating system also saves its registers.
    if platform.machine() not in {"x86_64", "AMD64"}:
        return frozenset()
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    features = frozenset(flags.partition(":")[2].split())
    return features if features.isdisjoint(_TILES) or _tiles_permitted() else features.difference(_TILES)


@functools.cache
def _tiles_permitted() -> bool:
    """Ask Linux for permission to use the tile registers, which add 8 KiB to the saved state of a thread."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
