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
    """name: what `QUASAR_CPU_LEVEL` calls it; features: as Linux lists them; flags: the compiler's."""

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
    """What GCC and Clang call a feature that Linux lists."""
    return f"-m{feature.replace('_', '-' if feature.startswith('amx') else '')}"


EMULATED = "amx-emulated"
# Best first. The last computes what `amx` does without its instructions, for tests on other processors.
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
    """The levels that this processor and its operating system support, best first."""
    features = _processor_features()
    return tuple(level for level in LEVELS if level.features <= features)


def chosen_levels(name: str | None = None) -> tuple[Level, ...]:
    """The named level, or the one that `QUASAR_CPU_LEVEL` names, or all that may be used, best first.

    None means PyTorch's own operations. Raises ValueError if the name is no level, or not one of this processor's.
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
    # Linux lists a feature only if the operating system saves its registers too.
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
    """Ask Linux for the tile registers, which a process may use only with permission: 8 KiB more to save per thread."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
