"""Prompt lookup: what followed the last few tokens when they occurred before."""

from __future__ import annotations

from pydantic import PositiveInt, validate_call
from torch import Tensor

from quasar.draft import Context, Draft, StepResult
from quasar.errors import RequestError
from quasar.verifiers.base import Verifier


class NgramDrafter:
    """Prompt lookup decoding (Saxena 2023): the longest suffix of n_max down to n_min tokens that occurred
    earlier in prompt or output, at its most recent place, offers the ``num_tokens`` tokens that followed it.

    Costs one dictionary lookup per n and step, and n_max insertions per new token; no model pass.
    """

    @validate_call
    def __init__(self, num_tokens: PositiveInt = 5, n_max: PositiveInt = 3, n_min: PositiveInt = 1) -> None:
        if n_min > n_max:
            raise RequestError(
                f"drafter.n_min={n_min} is larger than drafter.n_max={n_max}; lower one or raise the other"
            )
        self.num_tokens = num_tokens
        self.sizes = range(n_max, n_min - 1, -1)
        self._followers: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def begin(self, prompt: Tensor, verifier: Verifier) -> None:
        self._followers.clear()
        self._indexed = 0

    def propose(self, context: Context, budget: int) -> Draft:
        tokens = context.tokens
        self._index(tokens)
        for size in self.sizes:
            start = self._followers.get(tuple(tokens[-size:]))
            if start is not None and size < len(tokens):
                return Draft.chain(tokens[start : start + min(self.num_tokens, budget)])
        return Draft()

    def observe(self, step: StepResult) -> None:
        pass

    def _index(self, tokens: list[int]) -> None:
        """Remember for every n-gram that has a follower where its latest follower stands."""
        for position in range(max(self._indexed, 1), len(tokens)):
            for size in self.sizes:
                if size <= position:
                    self._followers[tuple(tokens[position - size : position])] = position
        self._indexed = len(tokens)
