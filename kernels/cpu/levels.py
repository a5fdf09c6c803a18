"""Levels of processor features that the kernels are compiled for."""

from __future__ import annotations

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


def _level(name: str, *features: str) -> Level:
    return Level(name, frozenset(features), tuple(f"-m{feature.replace('_', '')}" for feature in features))


# Best first.
LEVELS = (
    _level("avx512bf16", *_AVX512, "avx512_bf16"),
    _level("avx512", *_AVX512),
    _level("avx2", *_AVX2),
)
NO_KERNELS = "torch"


def available_levels() -> tuple[Level, ...]:
    """The levels that this processor and its operating system support, best first."""
    features = _processor_features()
    return tuple(level for level in LEVELS if level.features <= features)


def chosen_level(name: str | None = None) -> Level | None:
    """The named level, or the one that `QUASAR_CPU_LEVEL` names, or the best; None means PyTorch's own operations.

    Raises ValueError if the name is no level, or one that this processor does not have.
    """
    available = available_levels()
    wanted = name or os.environ.get(LEVEL_VARIABLE)
    if not wanted:
        return available[0] if available else None
    if wanted == NO_KERNELS:
        return None
    for level in available:
        if level.name == wanted:
            return level
    choices = ", ".join([*(level.name for level in available), NO_KERNELS])
    source = "" if name else f"{LEVEL_VARIABLE}="
    raise ValueError(f"{source}{wanted}: no level of CPU kernels here; this processor has {choices}")


def _processor_features() -> frozenset[str]:
    # Linux lists a feature only if the operating system saves its registers too.
    if platform.machine() not in {"x86_64", "AMD64"}:
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
