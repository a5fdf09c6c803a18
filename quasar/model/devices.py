"""The device and the dtype that a model is loaded with, and what this machine can do."""

from __future__ import annotations

import os

import torch
from quasar_kernels.cpu.levels import chosen_levels

from quasar.errors import RequestError


def check_machine(threads: int | None) -> None:
    """Raise RequestError if this machine has fewer CPUs than threads, or not the level of kernels that is set.

    The jobs of a sweep check this where they run.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and threads > available:
        raise RequestError(
            f"threads={threads}: this process may use {available} CPUs, and more threads would wait for each other; "
            f"use at most {available}, or null"
        )
    try:
        chosen_levels()
    except ValueError as error:
        raise RequestError(str(error)) from None


def use_threads(threads: int | None) -> None:
    """Compute with this number of threads from now on; None for PyTorch's choice. Raises what `check_machine` does."""
    check_machine(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """Return the device; ``auto`` is CUDA if it is available. Raises RequestError if ``cuda`` is not available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("device=cuda: PyTorch finds no CUDA device; use device=cpu or install a CUDA build of torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype; ``auto`` is BF16 on CPUs and on GPUs that support it, else FP16."""
    if name == "auto":
        bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
