"""Depth pruning: removes whole decoder blocks from the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.quantization.statistics import Calibration, Progress

Selection = Literal["block_influence", "angular", "deepest"]


def prune_depth(model: Transformer, layers: Sequence[int]) -> Transformer:
    """Remove the decoder blocks ``layers`` from the model, in place, and return it.

    Raises RequestError if the model does not have one of the layers, or if no layer would be left.
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


def select_layers(
    model: Transformer,
    ratio: float,
    selection: Selection,
    calibration: Callable[[], Calibration],
    progress: Progress,
) -> list[int]:
    """Return the layers to remove for a ratio, ascending. ``selection`` is one of

    block_influence: the layers that change the residual stream least, by ``1 - cos(x_l, x_l+1)`` (ShortGPT, Men et al.
        2024)
    angular: the consecutive layers over which the angle of the last token changes least (Gromov et al. 2024, section
        3.2)
    deepest: the consecutive layers before the last one, which is nearly as good and needs no data (ibid., section 4.4)

    Raises RequestError if fewer than two layers would be left; the message names the largest valid ratio.
    """
    layers = model.config.num_layers
    count = round(ratio * layers)
    if count > layers - 2:
        raise RequestError(
            f"verifier.ratio={ratio} would remove {count} of {layers} layers; use at most {(layers - 2) / layers:.2f}"
        )
    if count == 0:
        return []
    if selection == "deepest":
        return list(range(layers - 1 - count, layers - 1))
    sequences = calibration().sequences
    if selection == "block_influence":
        return sorted(block_influence(model, sequences, progress).argsort()[:count].tolist())
    start = int(angular_distance(model, sequences, count, progress).argmin())
    return list(range(start, start + count))


@torch.inference_mode()
def block_influence(model: Transformer, sequences: Sequence[Tensor], progress: Progress) -> Tensor:
    """Return the mean of ``1 - cos(x_l, x_l+1)`` over all tokens, [layers].

    x_l and x_l+1 are the residual stream before and after layer l.
    """
    total = torch.zeros(model.config.num_layers)
    for done, sequence in enumerate(sequences):
        progress(done, len(sequences))
        stream = residual_stream(model, sequence)
        total += (1 - F.cosine_similarity(stream[:-1], stream[1:], dim=-1)).sum(1).cpu()
    progress(len(sequences), len(sequences))
    return total / sum(map(len, sequences))


@torch.inference_mode()
def angular_distance(model: Transformer, sequences: Sequence[Tensor], count: int, progress: Progress) -> Tensor:
    """Return the mean of ``arccos(cos(x_l, x_l+count)) / π`` over the last tokens of the sequences.

    The shape is [layers - count + 1].
    """
    total = torch.zeros(model.config.num_layers - count + 1)
    for done, sequence in enumerate(sequences):
        progress(done, len(sequences))
        last = residual_stream(model, sequence)[:, -1]
        total += F.cosine_similarity(last[:-count], last[count:], dim=-1).clamp(-1, 1).arccos().cpu() / torch.pi
    progress(len(sequences), len(sequences))
    return total / len(sequences)


def residual_stream(model: Transformer, sequence: Tensor) -> Tensor:
    """Return the residual stream before the first layer and after every layer, float32 [layers + 1, R, hidden_size]."""
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, arguments, output: states.append(output.total().float()))
        for block in model.blocks
    ]
    try:
        tokens = sequence.to(model.device)
        model(tokens, outputs=slice(-1, None))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([model.embed(tokens).float(), *states])
