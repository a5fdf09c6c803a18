"""Attention of a block of rows over the cached context and the block itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp, in_16_bit, triton_function
from quasar_kernels.reference import attend


def block_attention(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> Tensor:
    """Softmax attention; every row sees every slot below ``start``.

    q: float [R, H, D]; keys, values: [H_kv, capacity, D], the block's own rows at slots ``start`` on (int64 [1], read
    when the kernel runs); block_mask: bool or integer [R, R], True where a row sees a row of the block. Query head h
    reads KV head h // (H / H_kv). Returns [R, H D] in the dtype of q. On a CPU in bfloat16 a row's result depends
    neither on the other rows nor on slots that it does not see.
    """
    out: Tensor = OP(q, keys, values, start, block_mask)
    return out


def _plain(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> Tensor:
    """For blocks of any size; gradients pass through it. It does not wait for the device to learn ``start``, so it
    reads every slot of ``keys``: a caller that knows where the block ends gives it no more."""
    rows = len(q)
    place = torch.arange(keys.shape[1], device=q.device) - start
    in_block = (place >= 0) & (place < rows)
    visible = (place < 0) | (in_block & block_mask.bool()[:, place.clamp(0, rows - 1)])
    return attend(q, keys, values, visible)


def _library_takes(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> bool:
    return calls.fits_heads(q, keys) and block_mask.dtype == torch.bool


def _triton_takes(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> bool:
    from quasar_kernels.triton.tuning import MAX_ROWS

    # For more rows, those of a prompt, the kernel would split the context for each of them.
    return in_16_bit(q) and len(q) <= MAX_ROWS


def _case(setting: Setting) -> Case:
    layer, rows, context = setting.layer, setting.rows, setting.context
    keys, values = (setting.normal(layer.kv_heads, context + rows, layer.head_dim) for _ in range(2))
    q = setting.normal(rows, layer.heads, layer.head_dim)
    start = torch.tensor([context], device=setting.device)
    causal = torch.ones(rows, rows, dtype=torch.bool, device=setting.device).tril()
    visible = F.pad(causal, (context, 0), value=True)

    def peer() -> Tensor:
        batch = (q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0))
        return F.scaled_dot_product_attention(*batch, attn_mask=visible, enable_gqa=True)

    return Case((q, keys, values, start, causal), peer, keys.nbytes + values.nbytes + 2 * q.nbytes)


OP = LayerOp(
    "block_attention",
    plain=_plain,
    cpu=Kernel(_library_takes, calls.block_attention),
    triton=Kernel(_triton_takes, triton_function("attention", "block_attention")),
    case=_case,
    check=checks.block_attention,
    reads_cache=True,
)
