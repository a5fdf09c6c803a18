"""From logits to the distribution that decoding samples from: temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quasar_kernels import first_maxima
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy decoding; ``top_k`` None and ``top_p`` 1 leave the distribution whole."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The sampling distribution of each row, float32, the shape of ``logits`` [..., V].

        The order is the one of transformers' logits processors: temperature, then top-k, then top-p. Top-p
        (Holtzman et al. 2020) keeps the smallest set of most likely tokens whose mass reaches ``top_p``.
        A greedy setting gives the one-hot distribution of the first maximum.
        """
        logits = logits.float()
        if self.greedy:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, best, 1.0)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            mass_before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(mass_before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


def most_likely(logits: Tensor) -> list[int]:
    """The token of the first maximum of every row. logits: [R, V]."""
    found: list[int] = first_maxima(logits).tolist()
    return found


def draw_on_device(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """As `draw`, with the same result, but int64 [1] on the device: ``multinomial`` itself makes the host wait for a
    look at its argument. Of exponential clocks with these rates, the first to ring is distributed like them."""
    clocks = torch.empty_like(probabilities).exponential_(1.0, generator=generator)
    return (probabilities / clocks).argmax(-1, keepdim=True)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """One token id drawn from an unnormalized distribution [V]."""
    return int(torch.multinomial(probabilities, 1, generator=generator))
