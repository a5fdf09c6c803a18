"""Between the QKV projection and attention: head normalization, rotary embedding, and writing to the KV cache."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import EPS, Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp, in_16_bit, triton_function
from quasar_kernels.reference import hadamard_transform, rms_norm, rotate
from quasar_kernels.slots import QuantizedSlots, Slots


def rotary_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
) -> Tensor:
    """Split a QKV projection, normalize and rotate its queries and keys (Su et al. 2021), and write keys and values to
    the cache.

    qkv: float [R, (H + 2 H_kv) D], query heads first; cos, sin: float32 [R, D], halves repeated; keys, values:
    [H_kv, capacity, D], written to the slots from ``start`` on (int64 [1], read when the kernel runs); q_norm, k_norm:
    weights [D] of an RMS normalization of each head (Qwen3), or [H D] and [H_kv D] of all heads together (OLMo 2), or
    None; one_plus: see `reference.rms_norm`. Returns the rotated queries [R, H, D].

    If keys and values are quantized slots, they are quantized here, and queries and keys are multiplied by a Hadamard
    matrix before, see `quasar_kernels.slots`.
    """
    out: Tensor = OP(qkv, cos, sin, keys, values, start, q_norm, k_norm, eps, one_plus)
    return out


def _plain(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
) -> Tensor:
    rows, head_dim = len(qkv), cos.shape[1]
    heads = qkv.view(rows, -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * len(keys), len(keys), len(keys)], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = _normalized(q, q_norm, eps, one_plus), _normalized(k, k_norm, eps, one_plus)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin).transpose(0, 1)
    slots = start + torch.arange(rows, device=qkv.device)
    if isinstance(keys, QuantizedSlots):
        assert isinstance(values, QuantizedSlots)
        keys.write(slots, hadamard_transform(k))
        values.write(slots, v.transpose(0, 1))
        return hadamard_transform(q).to(q.dtype)
    assert isinstance(values, Tensor)
    keys.index_copy_(1, slots, k)
    values.index_copy_(1, slots, v.transpose(0, 1))
    return q


def _normalized(heads: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    """Normalize heads [R, H, D], each by itself or all of a row together, as the size of the weight says."""
    return rms_norm(heads.reshape(len(heads), -1, len(weight)), weight, eps, one_plus).view(heads.shape)


def _library_takes(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
) -> bool:
    return calls.fits_heads(qkv, keys) and (q_norm is None or q_norm.dtype == qkv.dtype)


def _case(setting: Setting, bits: int = 16) -> Case:
    layer, rows, head_dim = setting.layer, setting.rows, setting.layer.head_dim
    qkv = setting.normal(rows, (layer.heads + 2 * layer.kv_heads) * head_dim)
    keys, values = (setting.slots(setting.context + 2 * rows, bits) for _ in range(2))
    angles = torch.rand(rows, head_dim, device=setting.device)
    norms = (setting.normal(head_dim), setting.normal(head_dim)) if layer.head_norms else (None, None)
    start = torch.tensor([setting.context + rows], device=setting.device)
    arguments = (qkv, angles.cos(), angles.sin(), keys, values, start, *norms, EPS)
    return Case(arguments, lambda: _plain(*arguments), 2 * qkv.nbytes + 2 * angles.nbytes)


OP = LayerOp(
    "rotary_write",
    plain=_plain,
    cpu=Kernel(_library_takes, calls.rotary_write),
    triton=Kernel(in_16_bit, triton_function("rotary", "rotary_write")),
    case=_case,
    check=checks.rotary_write,
)
KV8 = replace(OP, name="rotary_write_kv8", case=partial(_case, bits=8))
KV4 = replace(OP, name="rotary_write_kv4", case=partial(_case, bits=4))
"""The same op with quantized keys and values."""
