"""Per-channel scales for SmoothQuant and AWQ, which are folded into a linear layer and the layer before it.

``x W^T = (x / s) (W s)^T`` for any s > 0. The division of x is folded into the preceding norm or linear layer, so it
takes no time in a pass. SmoothQuant chooses s to reduce outliers in the activations, AWQ to scale up the weights of
channels with large activations.
"""

from __future__ import annotations

import torch
from quasar_kernels.reference import quantize_tokens
from torch import Tensor, nn

from quasar.model.transformer import Block, RMSNorm
from quasar.quantization.rounding import quantize_int8
from quasar.quantization.statistics import LinearStatistics

LAYERS = ("mlp.down", "mlp.gate_up", "attention.output", "attention.qkv")
"""Linear layers of a decoder block in the order in which scales are folded: from the last layer to the first."""

_NORMS = {"attention.qkv": "attention_norm", "mlp.gate_up": "mlp_norm"}
"""The norms before the layers whose inputs are normalized."""

SMOOTHING_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def smoothquant_scales(statistics: LinearStatistics, weight: Tensor, alpha: float) -> Tensor:
    """Return ``max|x|^alpha / max|W|^(1 - alpha)`` per input channel, float32 [K] (Xiao et al. 2023, equation 4)."""
    activations = statistics.absmax.to(weight.device).clamp(min=1e-5)
    weights = weight.float().abs().amax(0).clamp(min=1e-5)
    return activations**alpha / weights ** (1 - alpha)


def w8a8_error(x: Tensor, weight: Tensor, scales: Tensor, activation_group: int = 0) -> float:
    """Return the mean squared error of a layer's output with W8A8 after scaling.

    x: [S, K]; weight: [N, K]; scales: [K]; activation_group: see `Int8Weight`
    """
    tokens, token_scales = quantize_tokens(x / scales, activation_group or None)
    inputs = (tokens.float().unflatten(1, (token_scales.shape[1], -1)) * token_scales.unsqueeze(2)).flatten(1)
    quantized = quantize_int8(weight * scales)
    restored = inputs @ (quantized.values.float() * quantized.scales.unsqueeze(1)).T
    return float((restored - x @ weight.T).square().mean())


def best_smoothing(
    statistics: LinearStatistics, weight: Tensor, block: Block, layer: str, activation_group: int = 0
) -> tuple[float, Tensor]:
    """Return the alpha of least output error on the samples, and its scales [K]; 0 and ones if no scaling is better."""
    x, dense = statistics.samples.to(weight.device), weight.float()
    candidates = {0.0: torch.ones(dense.shape[1], device=weight.device)}
    for alpha in SMOOTHING_ALPHAS:
        candidates[alpha] = foldable(block, layer, smoothquant_scales(statistics, dense, alpha))
    return min(candidates.items(), key=lambda candidate: w8a8_error(x, dense, candidate[1], activation_group))


def foldable(block: Block, layer: str, scales: Tensor) -> Tensor:
    """Return scales [K] that can be folded into the layer before.

    For attention.output they are equal for all query heads of a group, because these read the same value channels. They
    are ones for a layer that reads the residual stream itself, because there is no layer before it (OLMo 2).
    """
    if layer in _NORMS and getattr(block, _NORMS[layer]) is None:
        return torch.ones_like(scales)
    if layer != "attention.output":
        return scales
    attention = block.attention
    grouped = scales.view(attention.num_kv_heads, -1, attention.head_dim)
    return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)


def fold(block: Block, layer: str, scales: Tensor) -> Tensor:
    """Multiply the input channels of ``layer`` by scales [K] and divide the outputs of the layer before, in place.

    Returns the scales that were used for ``layer``. They differ from the given ones because the divided weight of a
    norm is rounded to its dtype; the layer is scaled by exactly the inverse, so that the block's result is unchanged.
    """
    linear = block.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    if layer in _NORMS:
        norm = getattr(block, _NORMS[layer])
        if norm is None:
            return scales  # `foldable` has made them ones
        scales = _divide_norm(norm, scales)
    elif layer == "mlp.down":
        width = block.mlp.down.in_features
        _divide_rows(block.mlp.gate_up, slice(width, 2 * width), scales)
    else:
        attention = block.attention
        width = attention.num_kv_heads * attention.head_dim
        per_value = scales.view(attention.num_kv_heads, -1, attention.head_dim)[:, 0].reshape(-1)
        _divide_rows(attention.qkv, slice(-width, None), per_value)
    linear.weight.data = (linear.weight.float() * scales).to(linear.weight.dtype)
    return scales


def _divide_norm(norm: RMSNorm, scales: Tensor) -> Tensor:
    before = norm.factors()
    norm.set_factors(before / scales)
    after = norm.factors()
    # A channel whose factor is zero has only zeros, so its scale does not matter.
    return torch.where(after != 0, before / torch.where(after != 0, after, torch.ones_like(after)), scales)


def _divide_rows(linear: nn.Linear, rows: slice, scales: Tensor) -> None:
    linear.weight.data[rows] = (linear.weight.data[rows].float() / scales.unsqueeze(1)).to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias.data[rows] = (linear.bias.data[rows].float() / scales).to(linear.bias.dtype)
