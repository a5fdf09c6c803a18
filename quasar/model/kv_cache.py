"""The static KV cache: rollback sets a length, an accepted tree path is compacted in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, [num_kv_heads, capacity, head_dim] each, allocated once.

    Slots below ``length`` are committed. Rows written at or above it are tentative until `commit` keeps them.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.capacity = capacity
        self.length = 0
        shapes = [(layer.num_kv_heads, capacity, config.head_dim) for layer in config.layers]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    def commit(self, rows: Sequence[int]) -> None:
        """Keep the tentative rows ``rows`` (ascending, counted from ``length``) and drop all others."""
        start, count = self.length, len(rows)
        if list(rows) != list(range(count)):
            source = torch.tensor(rows, device=self.keys[0].device) + start
            for stored in (*self.keys, *self.values):
                # Indexing copies before the assignment, so overlapping slots are safe.
                stored[:, start : start + count] = stored[:, source]
        self.length = start + count

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` more rows; grows by doubling, so that it allocates seldom."""
        if self.length + rows <= self.capacity:
            return
        self.capacity = max(2 * self.capacity, self.length + rows)
        self.keys = [self._grown(stored) for stored in self.keys]
        self.values = [self._grown(stored) for stored in self.values]

    def _grown(self, stored: Tensor) -> Tensor:
        grown = stored.new_zeros(stored.shape[0], self.capacity, stored.shape[2])
        # Tentative rows move too: a drafter may be in the middle of a draft.
        grown[:, : stored.shape[1]] = stored
        return grown

    def clear(self) -> None:
        self.length = 0

    @property
    def bytes_per_token(self) -> int:
        return sum(stored.nbytes for stored in (*self.keys, *self.values)) // self.capacity
