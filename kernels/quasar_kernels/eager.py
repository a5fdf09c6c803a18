"""Twins of three ops for the eager forward, which takes the first slot as a number and the mask of all slots.

They go when that forward takes tensors, as `ops.rotary_write` and `ops.block_attention` do.
"""

from __future__ import annotations

from torch import Tensor

from quasar_kernels import reference
from quasar_kernels.cpu import calls
from quasar_kernels.cpu.library import Library
from quasar_kernels.dispatch import Kernel, Op


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension. x: [..., S]; weight: [S]."""
    out: Tensor = _RMS_NORM(x, weight, eps)
    return out


def rotary_write(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    start: int = 0,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`ops.rotary_write` at slots ``start`` to ``start + R``. rotation: cosines and sines, float32 [R, D]; norms:
    weights [D] for the query and the key heads, or None.

    Raises ValueError if the rows do not fit into the cache.
    """
    if start + len(qkv) > keys.shape[1]:
        raise ValueError(f"rows {start} to {start + len(qkv)} do not fit into a cache of {keys.shape[1]} slots")
    out: Tensor = _ROTARY_WRITE(qkv, rotation, keys[:, start:], values[:, start:], norms, eps)
    return out


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """`reference.attend`, over a static cache [H_kv, capacity, D]. On a CPU in bfloat16 a row's result depends neither
    on the other rows nor on slots that it does not see."""
    out: Tensor = _ATTEND(q, keys, values, visible)
    return out


def _rms_norm(library: Library, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return calls.rms_norm(library, x, weight, eps)[0]


def _plain_rotary_write(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    kv_heads, _, head_dim = keys.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = reference.rms_norm(q, norms[0], eps), reference.rms_norm(k, norms[1], eps)
    keys[:, : len(qkv)] = reference.rotate(k, *rotation).transpose(0, 1)
    values[:, : len(qkv)] = v.transpose(0, 1)
    return reference.rotate(q, *rotation)


def _rotary_write(
    library: Library,
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    (cos, sin), (q_norm, k_norm) = rotation, norms or (None, None)
    return calls.rotary_write(library, qkv, cos, sin, keys, values, None, q_norm, k_norm, eps)


def _attend(library: Library, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    return calls.block_attention(library, q, keys, values, None, visible)


_RMS_NORM = Op(
    "rms_norm",
    plain=reference.rms_norm,
    cpu=Kernel(lambda x, weight, eps: calls.fits(x, x.shape[-1]) and weight.dtype == x.dtype, _rms_norm),
    triton=None,
)
_ROTARY_WRITE = Op(
    "rotary_write",
    plain=_plain_rotary_write,
    cpu=Kernel(
        lambda qkv, rotation, keys, values, norms, eps: (
            calls.fits_heads(qkv, keys) and (norms is None or norms[0].dtype == qkv.dtype)
        ),
        _rotary_write,
    ),
    triton=None,
)
_ATTEND = Op(
    "attend",
    plain=reference.attend,
    cpu=Kernel(lambda q, keys, values, visible: calls.fits_heads(q, keys), _attend),
    triton=None,
)
