"""A bounded search for the set of skipped layers that makes decoding with layer-skip drafts fastest."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

START_RATIOS = (0.2, 0.35, 0.5)


@dataclass(frozen=True)
class SearchResult:
    """skipped: the fastest set, ascending; tokens_per_second: its speed; tried: number of measured sets."""

    skipped: list[int]
    tokens_per_second: float
    tried: int


def search_skipped_layers(
    speed: Callable[[list[int]], float], num_layers: int, sets: int, seed: int, progress: Callable[[int, int], None]
) -> SearchResult:
    """Find a fast set of skipped layers by hill climbing over at most ``sets`` sets.

    SWIFT (Xia et al. 2025) has the same goal, but searches while it decodes. The search starts with evenly spread sets
    of three sizes. Then it changes the fastest set so far at random: it skips one layer more, one fewer, or exchanges
    one. Every set is measured once, and every set skips at least one layer and keeps at least one. The search ends
    early if it finds no new change of the fastest set.

    speed: measures the tokens per second of a set of skipped layers, ascending
    """
    choose = random.Random(seed)
    speeds: dict[frozenset[int], float] = {}
    waiting = [frozenset(spread(num_layers, ratio)) for ratio in START_RATIOS]
    for _ in range(20 * sets):
        candidate = waiting.pop(0) if waiting else _changed(max(speeds, key=speeds.__getitem__), num_layers, choose)
        if len(speeds) == sets:
            break
        if candidate not in speeds and 0 < len(candidate) < num_layers:
            progress(len(speeds), sets)
            speeds[candidate] = speed(sorted(candidate))
    best = max(speeds, key=speeds.__getitem__)
    return SearchResult(sorted(best), speeds[best], len(speeds))


def spread(num_layers: int, ratio: float) -> list[int]:
    """Return a share of the layers, at least one, spread evenly without first and last; of two layers, the first."""
    inner = range(1, num_layers - 1) if num_layers > 2 else range(num_layers - 1)
    count = min(max(1, round(ratio * num_layers)), len(inner))
    return [inner[int((index + 0.5) * len(inner) / count)] for index in range(count)]


def _changed(skipped: frozenset[int], num_layers: int, choose: random.Random) -> frozenset[int]:
    kept = [layer for layer in range(num_layers) if layer not in skipped]
    change = choose.choice(("more", "fewer", "other"))
    without = skipped - {choose.choice(sorted(skipped))} if change != "more" else skipped
    return without | {choose.choice(kept)} if change != "fewer" else without
