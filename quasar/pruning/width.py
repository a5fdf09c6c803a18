"""Width pruning: the least important MLP channels leave every block, through torch-pruning's dependency graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.pruning.separate import SeparateBlock, SeparateTransformer
from quasar.pruning.size import block_parameters

# Narrowed widths are multiples of this, so that the low-bit kernels and 4-bit groups still fit.
WIDTH_MULTIPLE = 64


def prune_width(model: Transformer, ratio: float, progress: Callable[[int, int], None]) -> Transformer:
    """Remove MLP channels of least magnitude until ``ratio`` of the blocks' parameters is gone.

    A channel is a row of gate and of up together with a column of down; its importance is the product of their
    L2 norms, which bounds its contribution to the output. Every block loses the same number of channels.

    Raises RequestError where the MLPs hold too little for the ratio, naming the largest valid one.
    """
    import torch_pruning

    separate = SeparateTransformer(model)
    counts = removable_channels(separate, ratio)
    tokens = torch.arange(8, device=model.device)
    for parameter in separate.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        # It reports the norms' weights, which it then treats as what they are: vectors over the hidden size.
        warnings.simplefilter("ignore", UserWarning)
        graph = torch_pruning.DependencyGraph().build_dependency(
            separate, example_inputs=tokens, forward_fn=lambda traced, example: traced(example, rotate_heads=False)
        )
    blocks = [block for block in separate.blocks if isinstance(block, SeparateBlock)]
    for done, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        progress(done, len(blocks))
        weakest = channel_importance(block).argsort()[:count].tolist()
        group = graph.get_pruning_group(block.mlp.down, torch_pruning.prune_linear_in_channels, idxs=weakest)
        group.prune()
    progress(len(blocks), len(blocks))
    return separate.fused()


def removable_channels(model: SeparateTransformer, ratio: float) -> list[int]:
    """Channels to remove from each block for a ratio of the blocks' parameters, widths rounded to `WIDTH_MULTIPLE`."""
    blocks = [block for block in model.blocks if isinstance(block, SeparateBlock)]
    per_channel = sum(parameter.numel() for parameter in blocks[0].mlp.parameters()) / blocks[0].mlp.down.in_features
    target = ratio * block_parameters(model) / (per_channel * len(blocks))
    counts = []
    for block in blocks:
        width = block.mlp.down.in_features
        kept = round((width - target) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        if kept < WIDTH_MULTIPLE:
            largest = (width - WIDTH_MULTIPLE) * per_channel * len(blocks) / block_parameters(model)
            raise RequestError(
                f"verifier.ratio={ratio}: the MLPs hold too few parameters to remove that many by width alone; "
                f"use at most {int(largest * 100) / 100}, or verifier.method=depth"
            )
        counts.append(width - kept)
    return counts


def channel_importance(block: SeparateBlock) -> Tensor:
    """Magnitude of every MLP channel, float32 [intermediate_size]."""
    norms = [_norms(block.mlp.gate, 1), _norms(block.mlp.up, 1), _norms(block.mlp.down, 0)]
    return norms[0] * norms[1] * norms[2]


def _norms(linear: nn.Linear, dim: int) -> Tensor:
    return linear.weight.detach().float().norm(dim=dim)
