"""The decoder: one forward pass over one sequence (batch 1) for all families of models that `ModelConfig` describes.

This is the only description of the model. It is used for prefill, verification, drafting, teacher forcing and
gradients. `quasar.model.execution` runs it op by op, captures it as CUDA graphs, or records its decoder blocks on a
CPU. To make this possible, the decoder blocks only call layers and ops of `quasar_kernels`, and no op depends on the
length of the context: the first slot is a tensor, and the mask covers only the rows of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import quasar_kernels
import torch
from quasar_kernels import AttentionOptions, Quantized, Slots
from torch import Tensor, nn

from quasar.model.config import LayerShape, ModelConfig
from quasar.model.kv_cache import KVCache
from quasar.model.linear import Activations, Linear, QuantizedLinear
from quasar.model.rope import Ropes, Rotation


class Transformer(nn.Module):
    """Computes logits from token ids. It does not depend on drafting."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, shape) for shape in config.layers)
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.ropes = Ropes(config)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        start: int | Tensor | None = None,
        offsets: Tensor | None = None,
        block_mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
        outputs: Tensor | slice = slice(None),
    ) -> Tensor:
        """Return the logits of R new rows after the cached context.

        tokens:     int64 [R]
        cache:      keys and values are written to slots ``start`` to ``start + R``, its length is not changed; None if
                    the rows have no context
        start:      first slot, by default ``cache.length``; every row attends to all slots below it. If it is a tensor,
                    int64 [1], the ops read it when they run, and the caller must ensure that the rows fit the cache
        offsets:    int64 [R], position of each row relative to ``start`` (default 0, 1, 2 …)
        block_mask: bool or int64 [R, R], nonzero if a row attends to another of these rows (default causal)
        layers:     indices of the decoder blocks to run, in order (default all)
        outputs:    the rows whose logits are returned (default all)

        Returns float logits [len(outputs), V] in the model's dtype. Raises ValueError if the rows do not fit.
        """
        if start is None:
            start = 0 if cache is None else cache.length
        slots = None
        if cache is not None:
            # If the last slot is known here, the pass does not have to read the slots after it.
            slots = cache.slots(None if isinstance(start, Tensor) else start + len(tokens))
        rows = self.rows(len(tokens), start, offsets, block_mask)
        return self.head(self.run_blocks(self.embed(tokens), rows, slots, layers), outputs)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embedded tokens, [R, hidden_size]. tokens: int64 [R]."""
        x: Tensor = self.embedding(tokens)
        factor = self.config.embedding_multiplier
        if factor == 1.0:
            return x
        return x * (float(torch.tensor(factor, dtype=x.dtype)) if self.config.embedding_multiplier_rounded else factor)

    def rows(
        self,
        count: int,
        start: int | Tensor = 0,
        offsets: Tensor | None = None,
        block_mask: Tensor | None = None,
    ) -> Rows:
        """Return positions and mask of ``count`` rows for the decoder blocks; the arguments are those of `forward`."""
        if not isinstance(start, Tensor):
            start = torch.full((1,), start, device=self.device)
        if offsets is None:
            offsets = torch.arange(count, device=self.device)
        if block_mask is None:
            block_mask = torch.ones(count, count, dtype=torch.bool, device=self.device).tril_()
        return Rows(self.ropes(offsets + start), start, block_mask)

    def run_blocks(
        self, x: Tensor, rows: Rows, slots: Sequence[KeysValues] | None, layers: Sequence[int] | None = None
    ) -> ResidualStream:
        """Run the embedded rows [R, hidden_size] through the decoder blocks ``layers``.

        slots: keys and values of every layer, or None if the rows have no context
        """
        stream = ResidualStream(x)
        for index in range(len(self.blocks)) if layers is None else layers:
            stream = self.blocks[index](stream, rows, None if slots is None else slots[index])
        return stream

    def head(self, stream: ResidualStream, outputs: Tensor | slice = slice(None)) -> Tensor:
        """Return the logits [len(outputs), V] of the rows ``outputs`` of the residual stream."""
        x, update = (None if part is None else part[outputs] for part in stream)
        logits: Tensor = self.lm_head(self.norm(x, update, self.lm_head)[0])
        return self.finished(logits)

    def finished(self, logits: Tensor) -> Tensor:
        """Return the logits after what some families do to the output of the head."""
        if self.config.logit_divisor != 1.0:
            logits = logits / self.config.logit_divisor
        if (cap := self.config.logit_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype


class Block(nn.Module):
    """One decoder block: attention and MLP, each with a norm before it, after it, or both."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config) if config.pre_norms else None
        self.attention = Attention(config, shape)
        self.attention_post_norm = RMSNorm(config.hidden_size, config) if config.post_norms else None
        self.mlp_norm = RMSNorm(config.hidden_size, config) if config.pre_norms else None
        self.mlp = FeedForward(config, shape)
        self.mlp_post_norm = RMSNorm(config.hidden_size, config) if config.post_norms else None
        self.residual_multiplier = config.residual_multiplier

    def forward(self, stream: ResidualStream, rows: Rows, slots: KeysValues | None) -> ResidualStream:
        """Run the block. slots: the layer's keys and values in the cache, or None if the rows have no context."""
        x, residual = _input(self.attention_norm, stream, self.attention.qkv)
        stream = self._added(residual, self.attention(x, rows, slots), self.attention_post_norm)
        x, residual = _input(self.mlp_norm, stream, self.mlp.gate_up)
        return self._added(residual, self.mlp(x), self.mlp_post_norm)

    def _added(self, residual: Tensor, update: Tensor, norm: RMSNorm | None) -> ResidualStream:
        """Return the stream after the output of attention or of the MLP."""
        if norm is not None:
            update, _ = norm(update)
        if self.residual_multiplier != 1.0:
            return ResidualStream(quasar_kernels.add_scaled(residual, update, self.residual_multiplier))
        return ResidualStream(residual, update)


def _input(norm: RMSNorm | None, stream: ResidualStream, consumer: nn.Module) -> tuple[Activations, Tensor]:
    """Return the input of attention or of the MLP, whose first layer is ``consumer``, and the stream's sum."""
    if norm is None:
        total = stream.total()
        return total, total
    return norm(stream.value, stream.update, consumer)


class Attention(nn.Module):
    """Grouped-query attention with one projection for q, k and v. Query head h uses KV head h // group."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        width = (shape.num_heads + 2 * shape.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.output = Linear(shape.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            normalized = (shape.num_heads, shape.num_kv_heads) if config.qk_norm_whole else (1, 1)
            self.q_norm, self.k_norm = (RMSNorm(heads * config.head_dim, config) for heads in normalized)
        self.rotation = int(shape.second_rope)
        self.options = AttentionOptions(shape.window, config.attention_softcap, config.attention_scale)

    def forward(self, x: Activations, rows: Rows, slots: KeysValues | None) -> Tensor:
        qkv = self.qkv(x)
        keys, values = self._fresh_slots(qkv) if slots is None else slots
        q_norm, k_norm, eps, one_plus = self._head_norms()
        rotation = rows.rotations[self.rotation]
        q = quasar_kernels.rotary_write(qkv, *rotation, keys, values, rows.start, q_norm, k_norm, eps, one_plus)
        mixed = quasar_kernels.block_attention(q, keys, values, rows.start, rows.mask, self.options)
        update: Tensor = self.output(mixed)
        return update

    def _fresh_slots(self, qkv: Tensor) -> KeysValues:
        shape = self.num_kv_heads, len(qkv), self.head_dim
        return qkv.new_empty(shape), qkv.new_empty(shape)

    def _head_norms(self) -> tuple[Tensor | None, Tensor | None, float, bool]:
        if self.q_norm is None or self.k_norm is None:
            return None, None, 0.0, False
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.q_norm.one_plus


class FeedForward(nn.Module):
    """SwiGLU or GeGLU (Shazeer 2020) with one projection for gate and up."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * shape.intermediate_size, bias=config.gate_up_bias)
        self.down = Linear(shape.intermediate_size, config.hidden_size, bias=config.down_bias)
        self.gelu = config.activation == "gelu"

    def forward(self, x: Activations) -> Tensor:
        gate_up, down = self.gate_up(x), self.down
        product: Activations
        if isinstance(down, QuantizedLinear) and down.int8_activations:
            quantizing = quasar_kernels.gelu_mul_quantize if self.gelu else quasar_kernels.silu_mul_quantize
            product = Quantized(*quantizing(gate_up, down.activation_group_size), gate_up.dtype)
        else:
            product = quasar_kernels.gelu_mul(gate_up) if self.gelu else quasar_kernels.silu_mul(gate_up)
        update: Tensor = down(product)
        return update


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension (Zhang & Sennrich 2019), computed in float32.

    one_plus: whether the factor is 1 + weight
    """

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.one_plus, self.eps = config.norms_one_plus, config.rms_norm_eps
        self.weight = nn.Parameter(torch.zeros(size) if self.one_plus else torch.ones(size))

    def factors(self) -> Tensor:
        """Return what normalized rows are multiplied by, float32."""
        weight = self.weight.detach().float()
        return 1.0 + weight if self.one_plus else weight

    def set_factors(self, factors: Tensor) -> None:
        """Replace the weight, so that `factors` are these up to rounding to the dtype of the weight."""
        weight = factors.float() - 1.0 if self.one_plus else factors
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)

    def forward(
        self, x: Tensor, update: Tensor | None = None, consumer: nn.Module | None = None
    ) -> tuple[Activations, Tensor]:
        """Add ``update`` to the rows x and normalize the sum.

        Returns the normalized rows and the sum. The rows are quantized to int8 if the layer ``consumer`` needs that.
        """
        if isinstance(consumer, QuantizedLinear) and consumer.int8_activations:
            size = consumer.activation_group_size
            values, scales, total = quasar_kernels.add_rms_norm_quantize(
                x, self.weight, self.eps, update, self.one_plus, size
            )
            return Quantized(values, scales, x.dtype), total
        return quasar_kernels.add_rms_norm(x, self.weight, self.eps, update, self.one_plus)


class ResidualStream(NamedTuple):
    """The residual stream between two decoder blocks.

    value:  [R, hidden_size]
    update: [R, hidden_size], the output of the last block, which the op of the next norm adds to ``value``; None if it
            has been added, and before the first block
    """

    value: Tensor
    update: Tensor | None = None

    def total(self) -> Tensor:
        """Return the sum, [R, hidden_size]."""
        return self.value if self.update is None else quasar_kernels.add_scaled(self.value, self.update)


@dataclass(frozen=True)
class Rows:
    """Positions and mask of the rows of a pass, for the decoder blocks.

    rotations: cosines and sines of their positions, float32 [R, D], by every rotary embedding of the model
    start:    int64 [1], the slot of the first row; every row attends to all slots below it
    mask:     bool or int64 [R, R], nonzero if a row attends to another of these rows
    """

    rotations: tuple[Rotation, ...]
    start: Tensor
    mask: Tensor


KeysValues: TypeAlias = tuple[Slots, Slots]
"""Keys and values of a layer, [H_kv, capacity, D] each."""
