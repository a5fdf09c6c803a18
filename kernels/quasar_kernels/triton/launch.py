"""Programmatic dependent launch: a kernel is launched while the one before it still runs, and waits inside.

Between two kernels of a pass the memory would idle for a microsecond or two: while one drains, the other is launched
and fills its pipeline. Here the next kernel's programs are resident as soon as all programs of the one before have
started, and a product asks for its first weights, which depend on nothing, before it waits. Hopper and later; off
unless asked for (``QUASAR_PROGRAMMATIC_LAUNCH=1`` or `set_programmatic_launch`).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

_enabled = os.environ.get("QUASAR_PROGRAMMATIC_LAUNCH", "0") == "1"


def set_programmatic_launch(enabled: bool) -> None:
    """Decide for all launches from now on; captured graphs keep what they were captured with."""
    global _enabled
    _enabled = enabled


def dependent(device: torch.device) -> dict[str, Any]:
    """Arguments that every launch passes on: the kernel's own flag, and the launcher's where it is set."""
    if _enabled and _is_hopper(device):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Wait for the kernel before, which may have written anything, and let the one after be launched.

    Nothing that another kernel writes may be read before this, and nothing be written.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Bring the cache lines of these addresses to the L2 cache. Addresses must be valid."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
