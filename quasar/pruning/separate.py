"""The decoder with separate q, k, v, gate and up projections, whose dependencies torch-pruning can trace."""

from __future__ import annotations

from dataclasses import replace

import quasar_kernels
import torch
import torch.nn.functional as F
from quasar_kernels.reference import rotate
from torch import Tensor, nn

from quasar.model.config import LayerShape, ModelConfig
from quasar.model.linear import Linear
from quasar.model.rope import Rotation
from quasar.model.transformer import Attention, Block, FeedForward, RMSNorm, Transformer

Rotations = tuple[Rotation, ...]


class SeparateAttention(nn.Module):
    """`Attention` with separate q, k and v projections. The number of heads follows from the weights' shapes."""

    def __init__(self, stacked: Attention) -> None:
        super().__init__()
        self.head_dim = stacked.head_dim
        widths = [heads * self.head_dim for heads in (stacked.num_heads, stacked.num_kv_heads, stacked.num_kv_heads)]
        self.q, self.k, self.v = _split(stacked.qkv, widths)
        self.output = stacked.output
        self.q_norm, self.k_norm = stacked.q_norm, stacked.k_norm
        self.rotation, self.options = stacked.rotation, stacked.options

    def forward(self, x: Tensor, rotations: Rotations | None, visible: Tensor) -> Tensor:
        q, k, v = (projection(x).view(len(x), -1, self.head_dim) for projection in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                norm(part.reshape(len(x), -1, len(norm.weight)))[0].view(part.shape)
                for norm, part in ((self.q_norm, q), (self.k_norm, k))
            )
        if rotations is not None:
            q, k = (rotate(part, *rotations[self.rotation]) for part in (q, k))
        start = torch.zeros(1, dtype=torch.int64, device=x.device)
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        return self.output(quasar_kernels.block_attention(q, keys, values, start, visible, self.options))


class SeparateFeedForward(nn.Module):
    """`FeedForward` with separate gate and up projections."""

    def __init__(self, stacked: FeedForward) -> None:
        super().__init__()
        width = stacked.down.in_features
        self.gate, self.up = _split(stacked.gate_up, [width, width])
        self.down = stacked.down
        self.gelu = stacked.gelu

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        activated = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.down(activated * self.up(x))


class SeparateBlock(nn.Module):
    """`Block` with separate projections."""

    def __init__(self, block: Block, shape: LayerShape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        self.attention_post_norm, self.mlp_post_norm = block.attention_post_norm, block.mlp_post_norm
        self.attention = SeparateAttention(block.attention)
        self.mlp = SeparateFeedForward(block.mlp)
        self.residual_multiplier = block.residual_multiplier
        self._shape = shape

    def forward(self, x: Tensor, rotations: Rotations | None, visible: Tensor) -> Tensor:
        update = self.attention(_normalized(x, self.attention_norm), rotations, visible)
        x = x + _normalized(update, self.attention_post_norm) * self.residual_multiplier
        update = self.mlp(_normalized(x, self.mlp_norm))
        return x + _normalized(update, self.mlp_post_norm) * self.residual_multiplier

    @property
    def shape(self) -> LayerShape:
        head_dim = self.attention.head_dim
        return replace(
            self._shape,
            num_heads=self.attention.q.out_features // head_dim,
            num_kv_heads=self.attention.k.out_features // head_dim,
            intermediate_size=self.mlp.down.in_features,
        )


class SeparateTransformer(nn.Module):
    """The whole decoder with separate projections. It shares embedding, norms and head with the original model."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.config = model.config
        self.ropes, self.embedding, self.norm, self.lm_head = model.ropes, model.embedding, model.norm, model.lm_head
        self._embed, self._finished = model.embed, model.finished
        self.blocks = nn.ModuleList(
            SeparateBlock(block, shape)
            for block, shape in zip(model.blocks, model.config.layers, strict=True)
            if isinstance(block, Block)
        )

    def forward(self, tokens: Tensor, rotate_heads: bool = True) -> Tensor:
        """Return the logits [R, V] of a whole sequence, int64 [R], with a causal mask.

        rotate_heads: False leaves out the rotary embedding, whose slices torch-pruning cannot trace. The dependencies
            between widths are the same without it, because it mixes only dimensions within a head
        """
        rows = len(tokens)
        visible = torch.ones(rows, rows, dtype=torch.bool, device=tokens.device).tril_()
        rotations = self.ropes(torch.arange(rows, device=tokens.device)) if rotate_heads else None
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x, rotations, visible)
        return self._finished(self.lm_head(self.norm(x)[0]))

    def fused(self) -> Transformer:
        """Return an equivalent `Transformer` with stacked projections, whose config has the remaining widths."""
        blocks = [block for block in self.blocks if isinstance(block, SeparateBlock)]
        config: ModelConfig = replace(
            self.config,
            layers=tuple(block.shape for block in blocks),
            output_bias=blocks[0].attention.output.bias is not None,
            down_bias=blocks[0].mlp.down.bias is not None,
        )
        with torch.device("meta"):
            model = Transformer(config)
        model.ropes, model.embedding, model.norm, model.lm_head = self.ropes, self.embedding, self.norm, self.lm_head
        for block, separate in zip(model.blocks, blocks, strict=True):
            assert isinstance(block, Block)
            block.attention_norm, block.mlp_norm = separate.attention_norm, separate.mlp_norm
            block.attention_post_norm, block.mlp_post_norm = separate.attention_post_norm, separate.mlp_post_norm
            block.attention.qkv = _stack([separate.attention.q, separate.attention.k, separate.attention.v])
            block.attention.output = separate.attention.output
            block.attention.q_norm, block.attention.k_norm = separate.attention.q_norm, separate.attention.k_norm
            block.mlp.gate_up = _stack([separate.mlp.gate, separate.mlp.up])
            block.mlp.down = separate.mlp.down
        return model.eval().requires_grad_(False)


def _normalized(x: Tensor, norm: RMSNorm | None) -> Tensor:
    return x if norm is None else norm(x)[0]


def _split(linear: nn.Linear, widths: list[int]) -> list[nn.Linear]:
    weights = linear.weight.detach().split(widths)
    biases = [None] * len(widths) if linear.bias is None else linear.bias.detach().split(widths)
    return [
        _linear(weight.clone(), None if bias is None else bias.clone())
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _stack(parts: list[nn.Linear]) -> Linear:
    bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
    return _linear(torch.cat([part.weight.detach() for part in parts]), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear
