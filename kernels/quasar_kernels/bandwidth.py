"""Measures the copy bandwidth of a device's memory, which all fractions of a bandwidth refer to."""

from __future__ import annotations

import time

import torch

COPIES = 5


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes read and written per second by the best of several copies of a buffer larger than any cache."""
    # A GPU copies so fast that a smaller buffer would also measure the launch.
    size = 1 << 30 if device.type == "cuda" else 256 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / min(_seconds(source, target) for _ in range(COPIES))


def _seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    _finish(source.device)
    start = time.perf_counter()
    target.copy_(source)
    _finish(source.device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
