"""The copy bandwidth of a device's memory, which every fraction of a bandwidth refers to."""

from __future__ import annotations

import time

import torch

COPIES = 5


class CopyBandwidth:
    """Measures the copy bandwidth again and again with the same buffers, which are larger than any cache."""

    def __init__(self, device: torch.device) -> None:
        # A GPU copies so fast that a smaller buffer would time the launch too.
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
    """Bytes read and written per second while copying a buffer larger than any cache; the best of several copies."""
    copies = CopyBandwidth(device)
    return max(copies.measure() for _ in range(COPIES))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
