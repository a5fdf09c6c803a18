"""Measures repetition in a text. A damaged model repeats itself, and repetition is easy to draft."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_ngram_ratio(tokens: Sequence[int], size: int = 4) -> float | None:
    """Return distinct n-grams / all n-grams: 1 without repetition, near 0 for a loop; None for too short a text."""
    ngrams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None
