"""The decoder: Llama, Mistral, Qwen2, Qwen3 and OpenPangu in one forward pass over one sequence (batch 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasar.model.config import LayerShape, ModelConfig
from quasar.model.kv_cache import KVCache
from quasar.model.rope import Rope, rotate

# Float32 is the mode in which exactness is asserted. There, attention of blocks up to this size accumulates in
# float64, so that a row's result does not depend on how many other rows share its block: an int8 activation
# quantizer behind it would turn a difference in the last bit into a different integer.
EXACT_BLOCK = 128


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(x.dtype)


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
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation)
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        if slot is not None:
            cache, layer, start = slot
            keys, values = cache.write(layer, start, keys, values)
        return self.output(attend(q, keys, values, visible))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) with fused gate and up projections."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * shape.intermediate_size, bias=config.gate_up_bias)
        self.down = nn.Linear(shape.intermediate_size, config.hidden_size, bias=config.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


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


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of a block over the context.

    q: [R, H, D]; keys, values: [H_kv, S, D]; visible: bool [R, S], True where a row sees a slot. Returns [R, H * D].
    The H / H_kv query heads of a KV head are packed into rows, so that each key is read once.
    """
    rows, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    packed = q.transpose(0, 1).reshape(1, kv_heads, group * rows, head_dim)
    mask = visible.repeat(group, 1)
    if q.dtype == torch.float32 and rows <= EXACT_BLOCK:
        packed, keys, values = packed.double(), keys.double(), values.double()
    out = F.scaled_dot_product_attention(packed, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask)
    return out.view(heads, rows, head_dim).transpose(0, 1).reshape(rows, heads * head_dim).to(q.dtype)
