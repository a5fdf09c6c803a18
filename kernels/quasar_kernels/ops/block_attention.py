"""Attention of a block of rows over the cached context and the block itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.attention_options import PLAIN_ATTENTION, AttentionOptions
from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp, in_16_bit, triton_function
from quasar_kernels.reference import widened
from quasar_kernels.slots import QuantizedSlots, Slots

EXACT_BLOCK = 128
"""Largest float32 block whose attention accumulates in float64. Float32 is the mode in which exactness is asserted, and
this way a row's result does not depend on how many other rows are in its block. Int8 quantization of the activations
would otherwise turn a difference in the last bit into a different integer."""


def block_attention(
    q: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    block_mask: Tensor,
    options: AttentionOptions = PLAIN_ATTENTION,
) -> Tensor:
    """Compute softmax attention. Every row attends to every slot below ``start`` that is in its window.

    q: float [R, H, D]; keys, values: [H_kv, capacity, D], with the rows of the block in the slots from ``start`` on
    (int64 [1], read when the kernel runs); block_mask: bool or integer [R, R], nonzero if a row attends to a row of the
    block. Query head h reads KV head h // (H / H_kv). Returns [R, H D] in the dtype of q. On a CPU in bfloat16, a row's
    result does not depend on the other rows or on slots that the row does not attend to.

    Quantized keys and values are dequantized to the dtype of q. The result has the bits of attention over the
    dequantized tensors.
    """
    out: Tensor = OP(q, keys, values, start, block_mask, options)
    return out


def _plain(
    q: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    block_mask: Tensor,
    options: AttentionOptions = PLAIN_ATTENTION,
) -> Tensor:
    """Compute blocks of any size, with gradients.

    To read ``start`` it would have to wait for the device, so it reads every slot of ``keys``. A caller that knows
    where the block ends passes only the slots up to there.
    """
    keys, values = (part.dequantized(q.dtype) if isinstance(part, QuantizedSlots) else part for part in (keys, values))
    rows = len(q)
    place = torch.arange(keys.shape[1], device=q.device) - start
    in_block = (place >= 0) & (place < rows)
    own = place.clamp(0, rows - 1)
    visible = (place < 0) | (in_block & block_mask.bool()[:, own])
    if options.window is not None:
        # The slots of the block that a row attends to are its branch, in order. The row itself is the last of them.
        depths = block_mask.bool().cumsum(1)
        depth = depths[:, -1:]
        distance = torch.where(place < 0, depth - 1 - place, depth - depths[:, own])
        visible = visible & (distance < options.window)
    return _attend(q, keys, values, visible, options)


def _attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, options: AttentionOptions) -> Tensor:
    """Compute softmax attention: q [R, H, D]; keys, values [H_kv, S, D]; visible bool [R, S]. Returns [R, H * D].

    The H / H_kv query heads of a KV head are packed into rows, so that each key is read once.
    """
    rows, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    packed = q.transpose(0, 1).reshape(1, kv_heads, group * rows, head_dim)
    mask = visible.repeat(group, 1)
    if q.dtype == torch.float32 and rows <= EXACT_BLOCK:
        packed, keys, values = packed.double(), keys.double(), values.double()
    operands = packed, keys.unsqueeze(0), values.unsqueeze(0), mask
    if options.softcap is None:
        out = F.scaled_dot_product_attention(*operands, scale=options.scale)
    else:
        out = _capped_attention(*operands, options.scale or head_dim**-0.5, options.softcap)
    return out.view(heads, rows, head_dim).transpose(0, 1).reshape(rows, heads * head_dim).to(q.dtype)


def _capped_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Compute attention whose scores are capped, which PyTorch's operation cannot. q: [1, H_kv, rows, D]."""
    scores = widened(q) @ widened(keys).transpose(-1, -2) * scale
    capped = softcap * torch.tanh(scores / softcap)
    return torch.softmax(capped.masked_fill(~mask, -torch.inf), dim=-1) @ widened(values)


def _library_takes(
    q: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    block_mask: Tensor,
    options: AttentionOptions = PLAIN_ATTENTION,
) -> bool:
    return calls.fits_heads(q, keys) and block_mask.dtype == torch.bool


def _triton_takes(
    q: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    block_mask: Tensor,
    options: AttentionOptions = PLAIN_ATTENTION,
) -> bool:
    from quasar_kernels.triton.tuning import MAX_ROWS

    # The kernel would split the context for each of the many rows of a prompt. It applies the window to the context
    # alone, so the window must not be shorter than a block.
    return in_16_bit(q) and len(q) <= MAX_ROWS <= (options.window or MAX_ROWS)


def _case(setting: Setting, bits: int = 16) -> Case:
    layer, rows, context = setting.layer, setting.rows, setting.context
    keys, values = (setting.slots(context + rows, bits) for _ in range(2))
    q = setting.normal(rows, layer.heads, layer.head_dim)
    start = torch.tensor([context], device=setting.device)
    causal = torch.ones(rows, rows, dtype=torch.bool, device=setting.device).tril()
    visible = F.pad(causal, (context, 0), value=True)

    k, v = (part if isinstance(part, Tensor) else part.dequantized(q.dtype) for part in (keys, values))

    def peer() -> Tensor:
        batch = (q.transpose(0, 1).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))
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
KV8 = replace(OP, name="block_attention_kv8", case=partial(_case, bits=8))
KV4 = replace(OP, name="block_attention_kv4", case=partial(_case, bits=4))
"""The same op with quantized keys and values. PyTorch has no such attention, so its peer reads 16 bit."""
