"""The Triton kernels, if there is a GPU that they support."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor


def gpu_backend(x: Tensor) -> ModuleType | None:
    """The package of Triton kernels if x is on a GPU that they support and Triton is installed, else None."""
    return _triton() if x.is_cuda and _capable(x.device) else None


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("quasar_kernels.triton")


@functools.cache
def _capable(device: torch.device) -> bool:
    """Whether the GPU has asynchronous copies and bfloat16 tensor cores: compute capability 8.0 and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
