"""What the kernels run on."""

from __future__ import annotations

import functools

import torch
from triton import knobs


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which knows no inline assembly."""
    return bool(knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; those of an H100 if the interpreter replaces a GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
