"""Whether there are Triton kernels for a GPU."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def has_gpu_kernels(x: Tensor) -> bool:
    """Return whether x is on a GPU that the Triton kernels support, and Triton is installed."""
    return x.is_cuda and _triton_installed() and _capable(x.device)


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether the tensor cores of a device multiply FP8: compute capability 8.9 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capable(device: torch.device) -> bool:
    """Return whether the GPU has asynchronous copies and bfloat16 tensor cores: compute capability 8.0 or later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
