"""The static KV cache. A rollback sets its length, and an accepted path of a tree is compacted in place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from quasar_kernels import QuantizedSlots, Slots
from quasar_kernels.slots import slot_storage
from torch import Tensor

from quasar.model.config import ModelConfig

KvBits: TypeAlias = Literal[16, 8, 4]
"""Bits of the keys and values in the cache; 16 means the dtype of the activations."""


class KVCache:
    """Keys and values of every layer, [num_kv_heads, capacity, head_dim] each, allocated once.

    Slots below ``length`` are committed. Slots from ``length`` on are tentative until `commit` keeps them.

    bits: 16 keeps keys and values in ``dtype``; 8 and 4 quantize them when they are written, see
        `quasar_kernels.slots`. A slot does not depend on other slots, so that it is moved and dropped as in 16 bit
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        bits: KvBits = 16,
    ) -> None:
        self.capacity, self.bits = capacity, bits
        self.length = 0
        # Layers of the same shape share a tensor [2, layers, num_kv_heads, capacity, head_dim], so that one operation
        # moves the rows of all these layers, instead of two operations per layer. Quantized, they share the two tensors
        # of their codes and scales.
        heads = [layer.num_kv_heads for layer in config.layers]
        self._layers = {
            count: [layer for layer, own in enumerate(heads) if own == count] for count in dict.fromkeys(heads)
        }
        self._stores: list[tuple[Tensor, ...]] = []
        for count, layers in self._layers.items():
            shape = 2, len(layers), count, capacity, config.head_dim
            if bits == 16:
                self._stores.append((torch.zeros(shape, dtype=dtype, device=device),))
            else:
                self._stores.append(slot_storage(shape, bits, device))
        self._take_views()

    def commit(self, rows: Sequence[int]) -> None:
        """Keep the tentative rows ``rows`` (ascending, counted from ``length``) and drop all others."""
        start, count = self.length, len(rows)
        if list(rows) != list(range(count)):
            source = torch.tensor(rows).to(self.keys[0].device, non_blocking=True) + start
            for store in itertools.chain(*self._stores):
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
        self._stores = [tuple(self._grown(store) for store in stores) for stores in self._stores]
        self._take_views()

    def slots(self, end: int | None = None) -> list[tuple[Slots, Slots]]:
        """Return keys and values of every layer, only the first ``end`` slots if it is given.

        Raises ValueError if the cache has fewer slots.
        """
        if end is None:
            return list(zip(self.keys, self.values, strict=True))
        if end > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots, but {end} are needed; reserve them first")
        return [(_first(keys, end), _first(values, end)) for keys, values in zip(self.keys, self.values, strict=True)]

    def _grown(self, store: Tensor) -> Tensor:
        grown = store.new_zeros(*store.shape[:3], self.capacity, store.shape[4])
        # Tentative rows are copied too, because a drafter may be in the middle of a draft.
        grown[..., : store.shape[3], :] = store
        return grown

    def _take_views(self) -> None:
        """Set ``keys`` and ``values`` to those of each layer."""
        views: dict[int, tuple[Slots, Slots]] = {}
        for stores, own in zip(self._stores, self._layers.values(), strict=True):
            for place, layer in enumerate(own):
                keys, values = (_slots(*(store[kind, place] for store in stores)) for kind in (0, 1))
                views[layer] = keys, values
        self.keys = [views[layer][0] for layer in sorted(views)]
        self.values = [views[layer][1] for layer in sorted(views)]

    def clear(self) -> None:
        self.length = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of all layers, with their scales, for one token."""
        return sum(stored.nbytes for stored in (*self.keys, *self.values)) // self.capacity


def _slots(codes: Tensor, scales: Tensor | None = None) -> Slots:
    return codes if scales is None else QuantizedSlots(codes, scales)


def _first(slots: Slots, end: int) -> Slots:
    return slots[:, :end] if isinstance(slots, Tensor) else slots.first(end)
