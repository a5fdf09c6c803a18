"""The static KV cache. A rollback sets its length, and an accepted path of a tree is compacted in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, [num_kv_heads, capacity, head_dim] each, allocated once.

    Slots below ``length`` are committed. Slots from ``length`` on are tentative until `commit` keeps them.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.capacity = capacity
        self.length = 0
        # Layers of the same shape share a tensor [2, layers, num_kv_heads, capacity, head_dim], so that one operation
        # moves the rows of all these layers, instead of two operations per layer.
        heads = [layer.num_kv_heads for layer in config.layers]
        self._layers = {
            count: [layer for layer, own in enumerate(heads) if own == count] for count in dict.fromkeys(heads)
        }
        self._stores = [
            torch.zeros(2, len(layers), count, capacity, config.head_dim, dtype=dtype, device=device)
            for count, layers in self._layers.items()
        ]
        self._take_views()

    def commit(self, rows: Sequence[int]) -> None:
        """Keep the tentative rows ``rows`` (ascending, counted from ``length``) and drop all others."""
        start, count = self.length, len(rows)
        if list(rows) != list(range(count)):
            source = torch.tensor(rows).to(self.keys[0].device, non_blocking=True) + start
            for store in self._stores:
                # Indexing makes a copy before the assignment, so the slots may overlap.
                store[..., start : start + count, :] = store[..., source, :]
        self.length = start + count

    def rewind(self, length: int) -> None:
        """Drop all committed slots behind the first ``length``. Raises ValueError if there are fewer."""
        if length > self.length:
            raise ValueError(f"the cache has {self.length} committed slots, so it cannot keep the first {length}")
        self.length = length

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows after ``length``. The capacity at least doubles, so that growing is rare."""
        if self.length + rows <= self.capacity:
            return
        self.capacity = max(2 * self.capacity, self.length + rows)
        for index, store in enumerate(self._stores):
            grown = store.new_zeros(*store.shape[:3], self.capacity, store.shape[4])
            # Tentative rows are copied too, because a drafter may be in the middle of a draft.
            grown[..., : store.shape[3], :] = store
            self._stores[index] = grown
        self._take_views()

    def slots(self, end: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of every layer, only the first ``end`` slots if it is given.

        Raises ValueError if the cache has fewer slots.
        """
        if end is None:
            return list(zip(self.keys, self.values, strict=True))
        if end > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots, but {end} are needed; reserve them first")
        return [(keys[:, :end], values[:, :end]) for keys, values in zip(self.keys, self.values, strict=True)]

    def _take_views(self) -> None:
        layers = sum(map(len, self._layers.values()))
        self.keys, self.values = [self._stores[0]] * layers, [self._stores[0]] * layers
        for store, own in zip(self._stores, self._layers.values(), strict=True):
            for place, layer in enumerate(own):
                self.keys[layer], self.values[layer] = store[0, place], store[1, place]

    def clear(self) -> None:
        self.length = 0

    @property
    def bytes_per_token(self) -> int:
        return sum(stored.nbytes for stored in (*self.keys, *self.values)) // self.capacity
