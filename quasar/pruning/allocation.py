"""Chooses which structures to remove from each decoder block, for a given share of the blocks' parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.transformer import Block, Transformer
from quasar.pruning.importance import BlockScores
from quasar.pruning.size import block_parameters

# Remaining widths are multiples of this, so that low-bit kernels and 4-bit groups can still be used.
WIDTH_MULTIPLE = 64


@dataclass(frozen=True)
class Removal:
    """The structures to remove from one block: indices of MLP channels and of KV groups, ascending."""

    channels: list[int]
    groups: list[int]


def removals(
    model: Transformer, scores: Sequence[BlockScores], ratio: float, heads: bool, uniform: bool
) -> list[Removal]:
    """Return the least important structures of every block that together have ``ratio`` of the blocks' parameters.

    heads: whether the same share of KV groups is removed as of MLP channels; otherwise only channels are removed
    uniform: whether every block loses the same number of channels. Otherwise channels are ranked over all blocks by
        scores that are standardized within each block (An et al. 2024, section 3.3)

    Raises RequestError if a block would be left without a KV group or with fewer than `WIDTH_MULTIPLE` channels; the
    message names the largest valid ratio.
    """
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    total = block_parameters(model)
    per_channel = _parameters(blocks[0].mlp) / blocks[0].mlp.down.in_features
    per_group = _parameters(blocks[0].attention) / blocks[0].attention.num_kv_heads
    spare_channels = [block.mlp.down.in_features - WIDTH_MULTIPLE for block in blocks]
    spare_groups = [block.attention.num_kv_heads - 1 if heads else 0 for block in blocks]
    largest = (sum(spare_channels) * per_channel + sum(spare_groups) * per_group) / total
    if ratio > largest:
        left = "a KV group and " if heads else ""
        raise RequestError(
            f"verifier.ratio={ratio} would leave a layer without {left}{WIDTH_MULTIPLE} MLP channels; "
            f"use at most {int(largest * 100) / 100}, or verifier.method=depth"
        )
    share = round(ratio * sum(block.attention.num_kv_heads for block in blocks)) if heads else 0
    # If there are not enough channels for the rest, more groups than their share are removed.
    needed = -int(-(ratio * total - sum(spare_channels) * per_channel) // per_group)
    count = min(max(share, needed, 0), sum(spare_groups))
    groups = _weakest([block.groups for block in scores], spare_groups, count)
    target = max(ratio * total - count * per_group, 0) / per_channel
    widths = [block.mlp.down.in_features for block in blocks]
    gone = _even(target, spare_channels) if uniform else _ranked(target, [block.channels for block in scores])
    channels = [
        score.channels.argsort()[: width - kept].sort().values.tolist()
        for score, width, kept in zip(scores, widths, _rounded(widths, gone, target), strict=True)
    ]
    return [Removal(*pair) for pair in zip(channels, groups, strict=True)]


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _standardized(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std().clamp(min=1e-12)


def _weakest(groups: Sequence[Tensor], spare: Sequence[int], count: int) -> list[list[int]]:
    """Return the ``count`` groups of least importance relative to their block's mean, at most ``spare`` per block.

    Scores are not standardized here, because a block has too few groups: the standardized scores of two groups are the
    same for any two values.
    """
    ranked = sorted(
        (float(score), layer, group)
        for layer, scores in enumerate(groups)
        for group, score in enumerate(scores / scores.mean())
    )
    chosen: list[list[int]] = [[] for _ in groups]
    for _, layer, group in ranked:
        if count and len(chosen[layer]) < spare[layer]:
            chosen[layer].append(group)
            count -= 1
    return [sorted(of_layer) for of_layer in chosen]


def _even(target: float, spare: Sequence[int]) -> list[float]:
    return [target * of_layer / sum(spare) for of_layer in spare]


def _ranked(target: float, channels: Sequence[Tensor]) -> list[float]:
    """Return how many of the ``target`` channels with the least standardized scores are in each block."""
    standardized = [_standardized(of_layer) for of_layer in channels]
    everything = torch.cat(standardized)
    count = min(round(target), len(everything))
    if count == 0:
        return [0.0] * len(channels)
    threshold = everything.kthvalue(count).values
    return [float((of_layer <= threshold).sum()) for of_layer in standardized]


def _rounded(widths: Sequence[int], gone: Sequence[float], target: float) -> list[int]:
    """Return the widths to keep, multiples of `WIDTH_MULTIPLE`, so that about ``target`` channels are removed in total.

    The width of each block is rounded to the nearest multiple, at least one. Then the widths with the largest rounding
    errors are changed by one more multiple until the total fits.
    """
    wanted = [(width - of_layer) / WIDTH_MULTIPLE for width, of_layer in zip(widths, gone, strict=True)]
    most = [width // WIDTH_MULTIPLE for width in widths]
    kept = [min(max(round(value), 1), limit) for value, limit in zip(wanted, most, strict=True)]
    excess = round((sum(widths) - target) / WIDTH_MULTIPLE) - sum(kept)
    while excess:
        step = 1 if excess > 0 else -1
        movable = [layer for layer in range(len(kept)) if 1 <= kept[layer] + step <= most[layer]]
        if not movable:
            break
        layer = max(movable, key=lambda layer: (wanted[layer] - kept[layer]) * step)
        kept[layer] += step
        excess -= step
    return [count * WIDTH_MULTIPLE for count in kept]
