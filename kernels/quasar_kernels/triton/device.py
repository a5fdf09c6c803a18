"""The device that the kernels run on."""

from __future__ import annotations

import functools

import torch
from triton import knobs


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which has no inline assembly."""
    return bool(knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU, or that of an H100 in the interpreter."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
