"""The decoder: Llama, Mistral, Qwen2, Qwen3 and OpenPangu in one forward pass over one sequence (batch 1)."""

from __future__ import annotations

from collections.abc import Sequence

import quasar_kernels
import torch
from torch import Tensor, nn

from quasar.model.config import LayerShape, ModelConfig
from quasar.model.kv_cache import KVCache
from quasar.model.rope import Rope


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return quasar_kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with fused QKV projection; query head h reads KV head h // group."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        width = (shape.num_heads + 2 * shape.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.output = nn.Linear(shape.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor, slot: CacheSlot | None) -> Tensor:
        qkv = self.qkv(x)
        if slot is None:
            shape = self.num_kv_heads, len(x), self.head_dim
            keys, values, start = qkv.new_empty(shape), qkv.new_empty(shape), 0
        else:
            cache, layer, start = slot
            keys, values = cache.keys[layer], cache.values[layer]
        q = quasar_kernels.rotary_write(qkv, rotation, keys, values, start, *self._norms())
        return self.output(quasar_kernels.attend(q, keys, values, visible))

    def _norms(self) -> tuple[tuple[Tensor, Tensor] | None, float]:
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            return (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        return None, 0.0


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) with fused gate and up projections."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * shape.intermediate_size, bias=config.gate_up_bias)
        self.down = nn.Linear(shape.intermediate_size, config.hidden_size, bias=config.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(quasar_kernels.silu_mul(self.gate_up(x)))


class Block(nn.Module):
    """One pre-norm decoder block."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, shape)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, shape)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor, slot: CacheSlot | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, visible, slot)
        return x + self.mlp(self.mlp_norm(x))


CacheSlot = tuple[KVCache, int, int]
"""Where a layer's new rows go: the cache, the layer's index in it, and the first slot."""


class Transformer(nn.Module):
    """Token ids in, logits out; knows nothing of drafting."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config.rope, config.head_dim)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, shape) for shape in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        start: int | None = None,
        offsets: Tensor | None = None,
        block_mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
        outputs: Tensor | slice = slice(None),
    ) -> Tensor:
        """Logits of a block of rows after the cached context; causal inside the block unless a mask is given.

        tokens:     int64 [R]
        cache:      written at slots ``start`` to ``start + R``, its length left alone; None: the block is all there is
        start:      first slot, by default ``cache.length``; every slot below it is visible to every row
        offsets:    int64 [R], position of each row relative to ``start`` (default 0, 1, 2 …)
        block_mask: bool [R, R], True where a row sees a row of the block
        layers:     indices of the blocks to run, in order (default all)
        outputs:    the rows whose logits are wanted (default all)

        Returns float logits [len(outputs), V] in the model's dtype.
        """
        hidden = self.hidden(tokens, cache, start=start, offsets=offsets, block_mask=block_mask, layers=layers)
        return self.lm_head(self.norm(hidden[outputs]))

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        start: int | None = None,
        offsets: Tensor | None = None,
        block_mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """The residual stream after the last block, before the final norm, [R, hidden_size]; see `forward`."""
        rows = len(tokens)
        if start is None:
            start = cache.length if cache is not None else 0
        if offsets is None:
            offsets = torch.arange(rows, device=tokens.device)
        if block_mask is None:
            block_mask = torch.ones(rows, rows, dtype=torch.bool, device=tokens.device).tril_()
        prefix = torch.ones(rows, start, dtype=torch.bool, device=tokens.device)
        visible = torch.cat([prefix, block_mask], dim=1)
        rotation = self.rope(offsets + start)
        x = self.embedding(tokens)
        for layer in range(len(self.blocks)) if layers is None else layers:
            x = self.blocks[layer](x, rotation, visible, None if cache is None else (cache, layer, start))
        return x
