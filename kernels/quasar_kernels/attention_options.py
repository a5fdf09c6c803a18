"""Options of attention, in which model families differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionOptions:
    """How attention scores are computed, and which of them.

    window:  a row at position p attends only to positions above p - window; None for no limit. In a tree, the position
             of a node is the number of slots of its branch before it
    softcap: a score s becomes ``softcap * tanh(s / softcap)`` (Gemma 2); None if it stays as it is
    scale:   factor of the products of queries and keys; None for 1 / sqrt(head_dim)

    Raises ValueError for a number that is not positive.
    """

    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "softcap", "scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")


PLAIN_ATTENTION = AttentionOptions()
