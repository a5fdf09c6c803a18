"""Which layers to leave out when drafting: a bounded search for the set that decodes fastest."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

START_RATIOS = (0.2, 0.35, 0.5)


@dataclass(frozen=True)
class SearchResult:
    """skipped: the best set, ascending; tokens_per_second: its speed; tried: sets that were measured."""

    skipped: list[int]
    tokens_per_second: float
    tried: int


def search_skipped_layers(
    speed: Callable[[list[int]], float], num_layers: int, sets: int, seed: int, progress: Callable[[int, int], None]
) -> SearchResult:
    """Hill climbing over at most ``sets`` sets of layers; the goal is that of SWIFT (Xia et al. 2025), measured ahead.

    speed: measured tokens per second of a set of skipped layers, ascending

    Begins with evenly spread sets of three sizes; then changes the best set so far at random: one layer more, one
    fewer, or one for another. Every set is measured once, and at least one layer is kept and one skipped. Ends early
    where no such change of the best set is left to try.
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
    """A share of the layers, at least one, spread evenly over the second to the last but one where there are such."""
    inner = range(1, num_layers - 1) if num_layers > 2 else range(num_layers - 1)
    count = min(max(1, round(ratio * num_layers)), len(inner))
    return [inner[int((index + 0.5) * len(inner) / count)] for index in range(count)]


def _changed(skipped: frozenset[int], num_layers: int, choose: random.Random) -> frozenset[int]:
    kept = [layer for layer in range(num_layers) if layer not in skipped]
    change = choose.choice(("more", "fewer", "other"))
    without = skipped - {choose.choice(sorted(skipped))} if change != "more" else skipped
    return without | {choose.choice(kept)} if change != "fewer" else without
