"""Scales and minimums of groups of weights, as quantized checkpoints store them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupNumbers:
    """One number for every output and every group of inputs: ``values * factors``.

    values:  float32 or float16 [N, S]; each is shared by the same number of consecutive groups, a power of two
    factors: int8 [N, G], or None if S = G and all of them are 1

    For example the scales of Q6_K are values of 256 inputs with factors of 16 inputs, so G = 16 S.
    """

    values: Tensor
    factors: Tensor | None = None

    def __post_init__(self) -> None:
        values, factors = self.values, self.factors
        valid = values.dim() == 2 and values.dtype in (torch.float32, torch.float16) and values.numel() > 0
        if factors is not None:
            valid = valid and factors.dim() == 2 and factors.dtype == torch.int8 and len(factors) == len(values)
            shared = factors.shape[-1] // max(1, values.shape[-1])
            valid = valid and shared * values.shape[1] == factors.shape[1] and shared & (shared - 1) == 0 < shared
        if not valid:
            found = "none" if factors is None else f"{factors.dtype} {list(factors.shape)}"
            raise ValueError(
                "expected float32 or float16 values [N, S] with int8 factors [N, G], G a power of two times S, got "
                f"{values.dtype} {list(values.shape)} with factors {found}"
            )

    @staticmethod
    def compact(numbers: Tensor) -> GroupNumbers:
        """Store numbers, float32 [N, G], in float16 if that changes none of them."""
        halves = numbers.half()
        return GroupNumbers(halves if torch.equal(halves.float(), numbers) else numbers)

    @property
    def groups(self) -> int:
        return self.values.shape[1] if self.factors is None else self.factors.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.factors is None else self.factors.nbytes)

    def expanded(self) -> Tensor:
        """Return the numbers, float32 [N, G]. A product of a float16 value and a factor is exact."""
        values = self.values.float()
        if self.factors is None:
            return values
        return values.repeat_interleave(self.groups // values.shape[1], dim=1) * self.factors.float()
