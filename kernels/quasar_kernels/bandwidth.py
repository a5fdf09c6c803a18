"""Measures the copy bandwidth of a device's memory, which all fractions of a bandwidth refer to."""

from __future__ import annotations

import time

import torch

COPIES = 5


class CopyBandwidth:
    """Measures the copy bandwidth again and again with the same buffers, which are larger than any cache."""

    def __init__(self, device: torch.device) -> None:
        # A GPU copies so fast that a smaller buffer would also measure the launch.
        size = 1 << 30 if device.type == "cuda" else 256 << 20
        self._source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
        self._target = torch.zeros_like(self._source)

    def measure(self) -> float:
        """Return the bytes read and written per second by one copy."""
        device = self._source.device
        _finish(device)
        start = time.perf_counter()
        self._target.copy_(self._source)
        _finish(device)
        return 2 * self._source.nbytes / (time.perf_counter() - start)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes read and written per second by the best of several copies of a buffer larger than any cache."""
    copies = CopyBandwidth(device)
    return max(copies.measure() for _ in range(COPIES))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
