"""Detects weights that are on a low-bit grid, which shows that the checkpoint was quantized before and dequantized.

A verifier that quantizes to the same grid compresses nothing, so a comparison has to say what its reference was.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quasar.model.json_files import read_object
from quasar.model.tensor_files import TensorFiles

TYPES_FILE = "gguf_types.json"
"""A file in the folder of a dequantized GGUF file: the number of matrix weights of every type."""

FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
"""The types of GGUF files that are not quantized."""

GROUP = 32
"""Consecutive inputs that share a scale: the block of GGUF's formats, which divides the groups of all others."""

SAMPLED_GROUPS = 128
"""Number of evenly spaced groups that are checked in each tensor. The standard error of a tensor's share is then at
most 0.045, and that of the share of all tensors is much smaller."""

_STEPS_OF_4_BITS = 15
_LARGEST_INT8 = 127


def weights_on_grid(folder: Path) -> float | None:
    """Return the share of a checkpoint's matrix weights that are on a low-bit grid.

    It is known if this program has dequantized a GGUF file. Otherwise it is estimated from a sample of groups, which
    are compared with grids of 4 and 8 bits. None if no matrix has rows of a whole number of groups. About 0 for weights
    as they were trained, about 1 for a dequantized file.
    """
    if (folder / TYPES_FILE).is_file():
        weights = read_object(folder / TYPES_FILE)
        return sum(count for kind, count in weights.items() if kind not in FLOAT_TYPES) / sum(weights.values())
    files = TensorFiles(folder)
    found, total = 0.0, 0
    for name in files.names():
        weight = files.read(name)
        if weight.dim() != 2 or weight.shape[1] % GROUP or not weight.is_floating_point():
            continue
        groups = weight.reshape(-1, GROUP)
        sample = groups[torch.linspace(0, len(groups) - 1, min(len(groups), SAMPLED_GROUPS)).long()]
        found += on_grid(sample).float().mean().item() * weight.numel()
        total += weight.numel()
    return found / total if total else None


def on_grid(groups: Tensor) -> Tensor:
    """Return which groups are on a grid of 16 evenly spaced values, or of int8 values times the largest over 127.

    groups: float [N, G] in the dtype in which they were stored, whose rounding is allowed for. Returns bool [N].

    For example ``[0.5, 2.0, 1.0, 1.5]`` is on the grid ``0.5 + 0.5 q``; 32 weights drawn at random are on none. A group
    of equal values, zeros included, is on every grid.
    """
    # Dequantization computes in float32, then rounds to the dtype of the file.
    rounding = torch.finfo(groups.dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
    values = groups.double()
    return _on_4_bit_grid(values, rounding) | _on_8_bit_grid(values, rounding)


def _on_4_bit_grid(values: Tensor, rounding: float) -> Tensor:
    """Asymmetric, as Q4_0, Q4_1 and Q4_K are: lowest + q * step, of which the group may use a part only."""
    lowest, highest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    steps = torch.arange(1, _STEPS_OF_4_BITS + 1, dtype=values.dtype)
    step = ((highest - lowest) / steps).unsqueeze(1)  # [N, 1, 15]
    offset = (values - lowest).unsqueeze(2)
    error = (offset - step * (offset / step).nan_to_num().round()).abs()
    # The value was rounded, and so were the two ends that the step was found from.
    allowed = rounding * (values.abs() + torch.maximum(lowest.abs(), highest.abs())).unsqueeze(2)
    return (error <= allowed).all(1).any(1)


def _on_8_bit_grid(values: Tensor, rounding: float) -> Tensor:
    """Symmetric, as Q8_0 is: q * largest / 127."""
    step = values.abs().amax(1, keepdim=True) / _LARGEST_INT8
    error = (values - step * (values / step).nan_to_num().round()).abs()
    # The scale is known from the largest value, which was rounded like the value itself.
    return (error <= 2.001 * rounding * values.abs()).all(1)
