"""The device and the dtype that a model is loaded with."""

from __future__ import annotations

import torch

from quasar.errors import RequestError


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
