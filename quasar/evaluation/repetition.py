"""How much a text repeats itself: a damaged model loops, and a loop is easy to draft."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_ngram_ratio(tokens: Sequence[int], size: int = 4) -> float | None:
    """Distinct n-grams over all n-grams: 1 for text that never repeats one, near 0 for a loop; None if too short."""
    ngrams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None
