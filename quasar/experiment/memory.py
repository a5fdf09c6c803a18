"""Gives the memory of a finished run back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Free everything that nobody refers to any more, and return it to the system.

    The jobs of a sweep may share one process. Without this, models that are part of reference cycles would live on for
    an unknown time, and glibc would keep what is freed between other allocations: a sweep's memory would grow with
    every job.
    """
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
