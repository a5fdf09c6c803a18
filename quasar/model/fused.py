"""A decoder's pass over a block of rows as a chain of fused ops, every varying input a tensor on the device.

Computes what `Transformer.forward` computes, rounding at the same places. Nothing in it waits for the device or
allocates by the length of the context, so that it can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from quasar_kernels import block_ops
from torch import Tensor, nn

from quasar.model.kv_cache import KVCache
from quasar.model.transformer import Attention, Block, FeedForward, RMSNorm, Transformer

Rows = Tensor | tuple[Tensor, Tensor]
"""Activations [R, K]: floats, or int8 with float32 scales [R, G]."""


@runtime_checkable
class QuantizingLinear(Protocol):
    """A linear layer that may take activations which are quantized already.

    activation_group_size: elements of a token that share a scale; None: all
    """

    @property
    def int8_activations(self) -> bool: ...

    @property
    def activation_group_size(self) -> int | None: ...

    def forward_quantized(self, tokens: Tensor, token_scales: Tensor, dtype: torch.dtype) -> Tensor: ...


def fused_pass(
    model: Transformer,
    cache: KVCache,
    tokens: Tensor,
    start: Tensor,
    offsets: Tensor,
    block_mask: Tensor,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Logits [R, V] of a block of rows after the cached context.

    tokens, offsets: int64 [R], as in `Transformer.forward`; start: int64 [1], the first slot; block_mask: bool or
    integer [R, R]. Keys and values are written at slots ``start`` to ``start + R``, for which the cache must have room.
    """
    slots = cache.keys, cache.values, start
    residual, update = fused_blocks(
        model, model.embedding(tokens), model.rope(offsets + start), slots, block_mask, layers
    )
    rows, residual = _normalized(model.norm, residual, update, model.lm_head)
    return _project(model.lm_head, rows, residual.dtype)


def fused_blocks(
    model: Transformer,
    residual: Tensor,
    rotation: tuple[Tensor, Tensor],
    slots: tuple[Sequence[Tensor], Sequence[Tensor], Tensor],
    block_mask: Tensor,
    layers: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the decoder's blocks make of the residual stream [R, hidden_size]: that stream and the last update to it,
    which is not added yet (None without layers).

    rotation: cosines and sines [R, D]; slots: keys and values of all layers, and int64 [1], the first slot to write
    """
    keys, values, start = slots
    update: Tensor | None = None
    for index in range(len(model.blocks)) if layers is None else layers:
        block = model.blocks[index]
        assert isinstance(block, Block)
        rows, residual = _normalized(block.attention_norm, residual, update, block.attention.qkv)
        slot = (keys[index], values[index], start)
        update = _attention(block.attention, rows, residual.dtype, rotation, slot, block_mask)
        rows, residual = _normalized(block.mlp_norm, residual, update, block.mlp.gate_up)
        update = _feed_forward(block.mlp, rows, residual.dtype)
    return residual, update


def _attention(
    attention: Attention,
    rows: Rows,
    dtype: torch.dtype,
    rotation: tuple[Tensor, Tensor],
    slot: tuple[Tensor, Tensor, Tensor],
    block_mask: Tensor,
) -> Tensor:
    keys, values, start = slot
    q_norm, k_norm, eps = None, None, 0.0
    if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
        q_norm, k_norm, eps = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
    qkv = _project(attention.qkv, rows, dtype)
    q = block_ops.rotary_write_at(qkv, *rotation, keys, values, start, q_norm, k_norm, eps)
    return _project(attention.output, block_ops.block_attention(q, keys, values, start, block_mask), dtype)


def _feed_forward(mlp: FeedForward, rows: Rows, dtype: torch.dtype) -> Tensor:
    gate_up = _project(mlp.gate_up, rows, dtype)
    down = mlp.down
    if isinstance(down, QuantizingLinear) and down.int8_activations:
        return _project(down, block_ops.silu_mul_quantize(gate_up, down.activation_group_size), dtype)
    return _project(down, block_ops.silu_mul(gate_up), dtype)


def _normalized(norm: RMSNorm, residual: Tensor, update: Tensor | None, consumer: nn.Module) -> tuple[Rows, Tensor]:
    """Add the update to the residual stream and normalize it, in the form that the next layer takes."""
    if isinstance(consumer, QuantizingLinear) and consumer.int8_activations:
        group_size = consumer.activation_group_size
        tokens, scales, total = block_ops.add_rms_norm_quantize(residual, norm.weight, norm.eps, update, group_size)
        return (tokens, scales), total
    return block_ops.add_rms_norm(residual, norm.weight, norm.eps, update)


def _project(linear: nn.Module, rows: Rows, dtype: torch.dtype) -> Tensor:
    if isinstance(rows, tuple):
        assert isinstance(linear, QuantizingLinear)
        return linear.forward_quantized(*rows, dtype)
    if type(linear) is nn.Linear:
        return block_ops.linear_dense(rows, linear.weight, linear.bias)
    out: Tensor = linear(rows)
    return out
