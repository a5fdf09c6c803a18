"""Rotary position embedding (Su et al. 2021) and its scalings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasar.model.config import ModelConfig, RopeConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, float32 [R, head_dim] each, whose two halves are equal."""


class Ropes(nn.Module):
    """The rotary embeddings of a model: that of all blocks, or two of which every block uses one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        configs = [config.rope] if config.second_rope is None else [config.rope, config.second_rope]
        self.ropes = nn.ModuleList(Rope(rope, config.head_dim) for rope in configs)

    def forward(self, positions: Tensor) -> tuple[Rotation, ...]:
        """Return the rotation by every embedding. positions: int64 [R]."""
        return tuple(rope(positions) for rope in self.ropes)


class Rope(nn.Module):
    """Cosines and sines of positions. They are computed for every pass, so no maximum length has to be known."""

    frequencies: Tensor

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        rotated = config.rotated(head_dim)
        # The other elements are multiplied by 1. They are spread over both halves of the head, see `head_order`.
        self.kept = (head_dim - rotated) // 2
        frequencies, self.scale = _frequencies(config, rotated)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """Return the rotation by positions, int64 [R]."""
        angles = torch.outer(positions.float(), self.frequencies.float())
        cosines, sines = angles.cos() * self.scale, angles.sin() * self.scale
        if self.kept:
            cosines, sines = F.pad(cosines, (0, self.kept), value=1.0), F.pad(sines, (0, self.kept))
        return torch.cat([cosines, cosines], dim=-1), torch.cat([sines, sines], dim=-1)


def head_order(config: RopeConfig, head_dim: int) -> list[int] | None:
    """Return the order of a head's elements in which the rotated pairs are those that the ops rotate.

    The ops pair element k with element k + head_dim / 2. If only the first elements are rotated, a checkpoint pairs k
    with k + rotated / 2. None if both are the same. Queries and keys are reordered alike, so their products stay.

    >>> head_order(RopeConfig(share=0.5), 8)
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    rotated = config.rotated(head_dim)
    if rotated in (0, head_dim):
        return None
    half, middle = rotated // 2, (rotated + head_dim) // 2
    return [*range(half), *range(rotated, middle), *range(half, rotated), *range(middle, head_dim)]


def _frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return the inverse frequencies [head_dim / 2] and the factor on cosines and sines.

    head_dim: number of elements that are rotated
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / max(head_dim, 1)
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
