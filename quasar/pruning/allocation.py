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

WIDTH_MULTIPLE = 64
"""Remaining widths are multiples of this, which suits the tiles of the kernels and the usual groups of weights."""


@dataclass(frozen=True)
class Amount:
    """How much is removed, and of what.

    ratio: share of the decoder blocks' parameters
    heads: whether the same share of KV groups is removed as of MLP channels; otherwise only channels are removed
    uniform: whether every block loses the same number of channels. Otherwise channels are ranked over all blocks by
        scores that are standardized within each block (An et al. 2024, section 3.3)
    multiple: the remaining channels of a block that loses some are a multiple of this number
    """

    ratio: float
    heads: bool = False
    uniform: bool = False
    multiple: int = WIDTH_MULTIPLE


@dataclass(frozen=True)
class Removal:
    """The structures to remove from one block: indices of MLP channels and of KV groups, ascending."""

    channels: list[int]
    groups: list[int]


def removals(model: Transformer, scores: Sequence[BlockScores], amount: Amount) -> list[Removal]:
    """Return the least important structures of every block that together have the amount's share of the parameters.

    Raises RequestError if a block would be left without a KV group or with fewer than ``amount.multiple`` channels; the
    message names the largest valid ratio.
    """
    ratio, heads = amount.ratio, amount.heads
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    total = block_parameters(model)
    per_channel = _parameters(blocks[0].mlp) / blocks[0].mlp.down.in_features
    per_group = _parameters(blocks[0].attention) / blocks[0].attention.num_kv_heads
    spare_channels = [max(block.mlp.down.in_features - amount.multiple, 0) for block in blocks]
    spare_groups = [block.attention.num_kv_heads - 1 if heads else 0 for block in blocks]
    largest = (sum(spare_channels) * per_channel + sum(spare_groups) * per_group) / total
    if ratio > largest:
        left = "a KV group and " if heads else ""
        raise RequestError(
            f"verifier.ratio={ratio} would leave a layer without {left}{amount.multiple} MLP channels; "
            f"use at most {int(largest * 100) / 100}, or verifier.method=depth"
        )
    share = round(ratio * sum(block.attention.num_kv_heads for block in blocks)) if heads else 0
    # If there are not enough channels for the rest, more groups than their share are removed.
    needed = -int(-(ratio * total - sum(spare_channels) * per_channel) // per_group)
    count = min(max(share, needed, 0), sum(spare_groups))
    groups = _weakest([block.groups for block in scores], spare_groups, count)
    target = max(ratio * total - count * per_group, 0) / per_channel
    widths = [block.mlp.down.in_features for block in blocks]
    gone = _even(target, spare_channels) if amount.uniform else _ranked(target, [block.channels for block in scores])
    wanted = [width - of_layer for width, of_layer in zip(widths, gone, strict=True)]
    kept = _rounded(widths, wanted, sum(widths) - target, amount.multiple)
    channels = [
        score.channels.argsort()[: width - of_layer].sort().values.tolist()
        for score, width, of_layer in zip(scores, widths, kept, strict=True)
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
    return [target * of_layer / max(sum(spare), 1) for of_layer in spare]


def _ranked(target: float, channels: Sequence[Tensor]) -> list[float]:
    """Return how many of the ``target`` channels with the least standardized scores are in each block."""
    standardized = [_standardized(of_layer) for of_layer in channels]
    everything = torch.cat(standardized)
    count = min(round(target), len(everything))
    if count == 0:
        return [0.0] * len(channels)
    threshold = everything.kthvalue(count).values
    return [float((of_layer <= threshold).sum()) for of_layer in standardized]


def _rounded(widths: Sequence[int], wanted: Sequence[float], total: float, multiple: int) -> list[int]:
    """Return the widths to keep, whose sum is about ``total``.

    Each is the nearest multiple to what is wanted, at least one, or the block's whole width, which need not be a
    multiple. Then the widths with the largest rounding errors are changed to the next possible one until the sum gets
    no closer.

    Example: of two blocks with 200 channels, 150 and 190 are wanted, in multiples of 64. The nearest possible widths
    are 128 and 192, whose sum is 20 too small. The next larger ones would add 64 to the first, which is too much, or 8
    to the second. The result is 128 and 200.
    """
    possible = [[*range(multiple, width, multiple), width] for width in widths]
    places = [_nearest(sizes, value) for sizes, value in zip(possible, wanted, strict=True)]
    while True:
        kept = [sizes[place] for sizes, place in zip(possible, places, strict=True)]
        missing = total - sum(kept)
        step = 1 if missing > 0 else -1
        changes = {
            layer: possible[layer][place + step] - kept[layer]
            for layer, place in enumerate(places)
            if 0 <= place + step < len(possible[layer])
        }
        better = [layer for layer, change in changes.items() if abs(missing - change) < abs(missing)]
        if not better:
            return kept
        places[max(better, key=lambda layer: (wanted[layer] - kept[layer]) * step)] += step


def _nearest(sizes: Sequence[int], value: float) -> int:
    """Return the index of the size that is nearest to a value."""
    return min(range(len(sizes)), key=lambda place: abs(sizes[place] - value))
