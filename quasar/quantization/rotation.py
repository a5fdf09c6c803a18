"""Rotations that spread outliers over all channels, folded into the weights before they are quantized.

The residual stream is rotated by one orthogonal matrix R1, and the values of every attention head by a second one, R2
(Ashkboos et al. 2024, QuaRot; names of Liu et al. 2025, SpinQuant). Each is multiplied into the weights on both of its
sides, so that the model computes the same function, and a pass costs the same. Both are Hadamard matrices with random
signs, which mix every channel with every other one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from quasar.errors import RequestError
from quasar.model.transformer import Block, RMSNorm, Transformer

SEED = 0


class Rotation:
    """Rotates a model: first its embedding and head, when it is constructed, then block by block.

    The linear layers of a block must be in float32 when it is rotated, so that their weights are rounded only once. The
    head and the embedding are separate matrices afterwards, because only the head takes over the last norm's weights.

    Raises RequestError for a model with norms after attention and MLP.
    """

    def __init__(self, model: Transformer) -> None:
        generator = torch.Generator().manual_seed(SEED)
        config = model.config
        if config.post_norms:
            raise RequestError(
                "verifier.rotation=hadamard: this model normalizes the outputs of attention and MLP channel by channel "
                "before it adds them to the residual stream, which a rotation of that stream would change; choose "
                "rotation=none"
            )
        self._stream = random_hadamard(config.hidden_size, generator).to(model.device)
        self._values = random_hadamard(config.head_dim, generator).to(model.device)
        head = model.lm_head.weight.detach().float() * model.norm.factors()
        model.embedding.weight = _parameter(model.embedding.weight.float() @ self._stream, model.dtype)
        model.lm_head.weight = _parameter(head @ self._stream, model.dtype)
        model.norm.set_factors(torch.ones_like(model.norm.weight))
        model.config = dataclasses.replace(config, tie_word_embeddings=False)

    def rotate(self, block: Block) -> None:
        """Rotate a block in place."""
        attention, mlp = block.attention, block.mlp
        for norm, layer in ((block.attention_norm, attention.qkv), (block.mlp_norm, mlp.gate_up)):
            assert norm is not None  # every model without post-norms has them
            _fold_norm(norm, layer)
            layer.weight.data = layer.weight @ self._stream
        # The values are the last rows of qkv. R2 is undone by the columns of the output layer, head by head.
        rows = slice(-attention.num_kv_heads * attention.head_dim, None)
        attention.qkv.weight.data[rows] = self._by_head(attention.qkv.weight[rows].T).T
        if attention.qkv.bias is not None:
            attention.qkv.bias.data[rows] = self._by_head(attention.qkv.bias[rows])
        attention.output.weight.data = self._by_head(attention.output.weight)
        for layer in (attention.output, mlp.down):
            layer.weight.data = self._stream.T @ layer.weight
            if layer.bias is not None:
                layer.bias.data = layer.bias @ self._stream

    def _by_head(self, rows: Tensor) -> Tensor:
        """Rotate each head of rows [..., heads * D]."""
        return (rows.unflatten(-1, (-1, len(self._values))) @ self._values).flatten(-2)


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """Return a Hadamard matrix with random signs of its rows, scaled to be orthogonal, float32 [size, size].

    For a size of which no construction is known here it is a random orthogonal matrix.
    """
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1.0
    matrix = hadamard(size)
    if matrix is None:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()
    return signs * matrix / size**0.5


def hadamard(size: int) -> Tensor | None:
    """Return a matrix of 1 and -1 with orthogonal rows, float32 [size, size]; None if no construction is known here.

    Sylvester's doubling of Paley's two constructions (Paley 1933): of order q + 1 for a prime q = 3 mod 4, and of order
    2 (q + 1) for a prime q = 1 mod 4.
    """
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if size in (1, 2):
        return two[:size, :size]
    if size % 4:
        return None
    half = hadamard(size // 2)
    if half is not None:
        return torch.kron(two, half)
    if _is_prime(size - 1):
        # Its order is a multiple of 4, so the prime is 3 mod 4, and the bordered matrix is skew-symmetric.
        return _conference(size - 1, border=-1.0) + torch.eye(size)
    if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        symmetric = _conference(size // 2 - 1, border=1.0)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(symmetric, two) + torch.kron(torch.eye(size // 2), diagonal)
    return None


def _conference(prime: int, border: float) -> Tensor:
    """Return the Jacobsthal matrix of the quadratic residues modulo a prime with a border, [prime + 1, prime + 1]."""
    residues = torch.full((prime,), -1.0)
    residues[torch.arange(1, prime).square() % prime] = 1.0
    residues[0] = 0.0
    places = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[1:, 1:] = residues[(places.unsqueeze(1) - places) % prime]
    matrix[0, 0] = 0.0
    matrix[1:, 0] = border
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _fold_norm(norm: RMSNorm, layer: nn.Linear) -> None:
    """Multiply a norm's weights into the columns of the layer after it."""
    layer.weight.data = layer.weight * norm.factors()
    norm.set_factors(torch.ones_like(norm.weight))


def _parameter(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.detach().to(dtype), requires_grad=False)
