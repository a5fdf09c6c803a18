"""Turns logits into the distribution that decoding samples from, with temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from quasar_kernels import first_maxima
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Temperature 0 means greedy decoding; ``top_k`` None and ``top_p`` 1 remove no tokens.

    coupled: whether the random numbers of a token depend only on the seed and on the token's position, see `race`
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    coupled: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sampling distribution of each row: float32, same shape as ``logits`` [..., V].

        The order is the same as in transformers' logits processors: temperature, then top-k, then top-p. Top-p
        (Holtzman et al. 2020) keeps the smallest set of most likely tokens whose total probability reaches ``top_p``.
        Greedy decoding gives a one-hot distribution at the first maximum.
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
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            mass_before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(mass_before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def ranking(self, logits: Tensor, seed: int, position: int) -> Tensor:
        """Return values [V] whose argmax is the next token, for settings with which the seed alone decides on it.

        They are the logits [V] in greedy decoding, and else the logarithms of the `race`, which are logits with noise.
        """
        if self.greedy:
            return logits.float()
        return race(self.probabilities(logits), seed, position).log()


def most_likely(logits: Tensor) -> list[int]:
    """Return the index of the first maximum of every row of ``logits`` [R, V]."""
    found: list[int] = first_maxima(logits).tolist()
    return found


def draw_on_device(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Same as `draw` with the same result, but returns int64 [1] on the device without a host synchronization.

    ``torch.multinomial`` synchronizes to check its argument. Instead, this draws an exponential variable with rate p_i
    for each token i; the index of the smallest one is distributed like p.
    """
    clocks = torch.empty_like(probabilities).exponential_(1.0, generator=generator)
    return (probabilities / clocks).argmax(-1, keepdim=True)


def race(probabilities: Tensor, seed: int, position: int) -> Tensor:
    """Return p_i / e_i for every token i, with e_i exponential with rate 1; the index of the maximum is a draw from p.

    This is the Gumbel-max trick: log p_i - log e_i is a log-probability with Gumbel noise. The noise is a function of
    the seed, the position and the token, from a counter-based generator (Philox, Salmon et al. 2011). So two models
    that draw the token at the same position often draw the same one, and always if p = q: they agree on token j with
    probability 1 / sum_i max(p_i / p_j, q_i / q_j).

    probabilities: [V], not necessarily normalized. Returns float64 [V] on the same device

    Example: p = (0.6, 0.4) and e = (1.2, 0.5) give (0.5, 0.8), so that token 1 is drawn.
    """
    clocks: Tensor
    if probabilities.is_cuda:
        # On a GPU PyTorch draws by Philox itself. A seed has 64 bits there, on a CPU only 32.
        key = int.from_bytes(hashlib.sha256(f"{seed} {position}".encode()).digest()[:7], "big")
        generator = torch.Generator(probabilities.device).manual_seed(key)
        clocks = torch.empty_like(probabilities, dtype=torch.float64).exponential_(generator=generator)
    else:
        philox = np.random.Generator(np.random.Philox(key=[seed, position]))
        clocks = torch.from_numpy(philox.standard_exponential(len(probabilities)))
    return probabilities.double() / clocks


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """Draw one token id from an unnormalized distribution [V]."""
    return int(torch.multinomial(probabilities, 1, generator=generator))
