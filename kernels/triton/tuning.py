"""How a product is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """block_k counts elements of K per iteration; split_k programs share the K of a tile."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    warps: int = 4
    stages: int = 4

    def grid(self, rows: int, outputs: int) -> tuple[int, int, int]:
        """Blocks of N, splits of K, blocks of M."""
        return _blocks(outputs, self.block_n), self.split_k, _blocks(rows, self.block_m)

    def workspace(self, rows: int, outputs: int) -> tuple[int, int]:
        """Tiles and partial sums that split-K needs room for; none without it."""
        if self.split_k == 1:
            return 0, 0
        columns, _, row_blocks = self.grid(rows, outputs)
        tiles = columns * row_blocks
        return tiles, tiles * self.split_k * self.block_m * self.block_n


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
