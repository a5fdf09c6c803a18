"""Depth pruning: whole decoder blocks leave the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from quasar.errors import RequestError
from quasar.model.transformer import Transformer


def prune_depth(model: Transformer, layers: Sequence[int]) -> Transformer:
    """The model without the blocks ``layers``; shares all other weights.

    Raises RequestError for layers the model lacks, or where none would be left.
    """
    count = model.config.num_layers
    missing = sorted(layer for layer in layers if not 0 <= layer < count)
    if missing:
        raise RequestError(f"verifier.layers names {missing}, but the model's layers are 0 to {count - 1}")
    kept = [layer for layer in range(count) if layer not in set(layers)]
    if not kept:
        raise RequestError(f"verifier.layers={list(layers)} leaves no layer; keep at least one of {count}")
    model.blocks = nn.ModuleList(model.blocks[layer] for layer in kept)
    model.config = replace(model.config, layers=tuple(model.config.layers[layer] for layer in kept))
    return model


def deep_layers(num_layers: int, ratio: float) -> list[int]:
    """The contiguous layers to remove for a ratio, all before the last one.

    Gromov et al. 2024, section 4.4: dropping the deepest layers but the last is nearly as good as choosing by
    similarity, and needs no data.
    """
    count = round(ratio * num_layers)
    if count > num_layers - 2:
        raise RequestError(
            f"verifier.ratio={ratio} would remove {count} of {num_layers} layers; "
            f"use at most {(num_layers - 2) / num_layers:.2f}"
        )
    return list(range(num_layers - 1 - count, num_layers - 1))
