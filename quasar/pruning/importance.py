"""Importance scores of the MLP channels and KV groups of every decoder block, for width pruning.

A channel consists of a row of gate, a row of up and a column of down. A KV group consists of a KV head, the query heads
that use it, and their columns of the output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasar.model.transformer import Block, Transformer
from quasar.quantization.statistics import Calibration, LinearStatistics, Progress, Statistics

Importance = Literal["magnitude", "taylor", "wanda", "flap"]


@dataclass(frozen=True)
class BlockScores:
    """Importance scores of one block, float32: channels [intermediate_size], groups [num_kv_heads]."""

    channels: Tensor
    groups: Tensor


def scores(
    model: Transformer, importance: Importance, calibration: Callable[[], Calibration], progress: Progress
) -> list[BlockScores]:
    """Return the importance scores of every block. ``importance`` is one of

    magnitude: product (channels) or sum (groups) of the L2 norms of a structure's weights; it needs no data
    wanda:     ``sum over outputs |W_ic| · rms(x_c)`` of the input columns c (Sun et al. 2024, in its structured form)
    flap:      ``var(x_c) · ||W_c||²``, the error of replacing x_c by its mean (An et al. 2024, equation 5)
    taylor:    squared first-order change of the loss, ``(sum x_c · dL/dx_c)²`` (Molchanov et al. 2019, equation 8)
    """
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    if importance == "magnitude":
        return [_magnitude(block) for block in blocks]
    if importance == "taylor":
        return _taylor(model, blocks, calibration().sequences, progress)
    statistics = calibration().statistics(model, progress)
    column_scores = _wanda if importance == "wanda" else _flap
    return [
        BlockScores(
            column_scores(block.mlp.down, statistics[f"blocks.{index}.mlp.down"]),
            _by_group(column_scores(block.attention.output, statistics[f"blocks.{index}.attention.output"]), block),
        )
        for index, block in enumerate(blocks)
    ]


def input_means(statistics: Statistics, index: int) -> tuple[Tensor, Tensor]:
    """Return the mean inputs [K] of a block's output and down projections, for FLAP's bias compensation."""
    return statistics[f"blocks.{index}.attention.output"].mean, statistics[f"blocks.{index}.mlp.down"].mean


def _magnitude(block: Block) -> BlockScores:
    gate, up = block.mlp.gate_up.weight.float().chunk(2)
    channels = gate.norm(dim=1) * up.norm(dim=1) * block.mlp.down.weight.float().norm(dim=0)
    attention = block.attention
    widths = [heads * attention.head_dim for heads in (attention.num_heads, *[attention.num_kv_heads] * 2)]
    rows = [part.norm(dim=1).square() for part in attention.qkv.weight.float().split(widths)]
    columns = attention.output.weight.float().norm(dim=0).square()
    parts = [part.view(attention.num_kv_heads, -1).sum(1).sqrt() for part in (*rows, columns)]
    return BlockScores(channels, torch.stack(parts).sum(0))


def _wanda(linear: nn.Linear, statistics: LinearStatistics) -> Tensor:
    weight = linear.weight.float()
    return weight.abs().sum(0) * statistics.mean_square.to(weight.device).sqrt()


def _flap(linear: nn.Linear, statistics: LinearStatistics) -> Tensor:
    weight = linear.weight.float()
    variance = (statistics.mean_square - statistics.mean.square()).clamp(min=0)
    return weight.square().sum(0) * variance.to(weight.device)


def _taylor(
    model: Transformer, blocks: Sequence[Block], sequences: Sequence[Tensor], progress: Progress
) -> list[BlockScores]:
    """Run one backward pass per sequence. It computes gradients of the projections' inputs, but not of weights."""
    channels = [torch.zeros(block.mlp.down.in_features, device=model.device) for block in blocks]
    groups = [torch.zeros(block.attention.num_kv_heads, device=model.device) for block in blocks]
    inputs: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].retain_grad()
        inputs[module] = arguments[0]

    hooks = [
        linear.register_forward_pre_hook(watch)
        for block in blocks
        for linear in (block.mlp.down, block.attention.output)
    ]
    hooks.append(model.embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_()))
    try:
        for done, sequence in enumerate(sequences):
            progress(done, len(sequences))
            tokens = sequence.to(model.device)
            with torch.enable_grad():
                F.cross_entropy(model(tokens[:-1]).float(), tokens[1:]).backward()
            for index, block in enumerate(blocks):
                channels[index] += _first_order(inputs[block.mlp.down]).square()
                groups[index] += _by_group(_first_order(inputs[block.attention.output]), block).square()
        progress(len(sequences), len(sequences))
    finally:
        for hook in hooks:
            hook.remove()
    return [BlockScores(*pair) for pair in zip(channels, groups, strict=True)]


def _first_order(x: Tensor) -> Tensor:
    """Return the change of the loss if a column of x [R, K] is set to zero, to first order and up to its sign."""
    assert x.grad is not None
    return (x.detach().float() * x.grad.float()).sum(0)


def _by_group(columns: Tensor, block: Block) -> Tensor:
    """Return the sums [num_kv_heads] over the columns of the output projection that belong to each KV group."""
    return columns.view(block.attention.num_kv_heads, -1).sum(1)
