"""Rotary position embedding (Su et al. 2021) and its scalings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quasar.model.config import RopeConfig


class Rope(nn.Module):
    """Cosines and sines of positions. They are computed for every pass, so no maximum length has to be known."""

    frequencies: Tensor

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        frequencies, self.scale = _frequencies(config, head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, float32 [R, head_dim], whose two halves are equal. positions: int64 [R]."""
        angles = torch.outer(positions.float(), self.frequencies.float())
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale


def _frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return the inverse frequencies [head_dim / 2] and the factor on cosines and sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / config.theta**exponents
    parameters = config.parameters
    if config.type == "linear":
        return frequencies / parameters["factor"], 1.0
    if config.type == "llama3":
        return _llama3(frequencies, parameters), 1.0
    if config.type == "yarn":
        return _yarn(frequencies, config.theta, head_dim, parameters)
    if config.type == "factors":
        return frequencies / torch.tensor(config.factors), parameters["attention_factor"]
    return frequencies, 1.0


def _llama3(frequencies: Tensor, parameters: dict[str, float]) -> Tensor:
    """Llama 3.1: divide the frequencies of long wavelengths by the factor, keep short ones, interpolate in between."""
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    ramp = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * frequencies / parameters["factor"] + ramp * frequencies


def _yarn(frequencies: Tensor, theta: float, head_dim: int, parameters: dict[str, float]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, section 3.2): interpolate slow dimensions, keep fast ones, change the attention scale."""
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast", 32.0)), dimension(parameters.get("beta_slow", 1.0))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    interpolated = ((steps - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    scale = parameters.get("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return frequencies * (1 - interpolated) + frequencies / factor * interpolated, scale
