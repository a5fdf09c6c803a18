"""What lies between the products of a decoder layer, as models call it; backends as in `quasar_kernels.ops`.

The compiled kernels take bfloat16 on a CPU where no gradient is wanted; everything else takes the definition in
`quasar_kernels.reference`, which is made of PyTorch operations.
"""

from __future__ import annotations

from torch import Tensor

from quasar_kernels import reference
from quasar_kernels.cpu import backend
from quasar_kernels.cpu import fused as cpu
from quasar_kernels.weights import Quantized


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension. x: [..., S]; weight: [S]."""
    if cpu.fits(x, x.shape[-1]) and weight.dtype == x.dtype and (library := backend()) is not None:
        return cpu.rms_norm(library, x, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, group_size: int | None = None) -> Quantized:
    """`rms_norm` of [M, S], quantized per row or group."""
    if cpu.fits(x, x.shape[-1]) and weight.dtype == x.dtype and (library := backend()) is not None:
        return Quantized(*cpu.rms_norm_quantize(library, x, weight, eps, group_size=group_size)[:2], x.dtype)
    return Quantized(*reference.quantize_tokens(reference.rms_norm(x, weight, eps), group_size), x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``. gate_up: [M, 2 S], the gates first; returns [M, S]."""
    if cpu.fits(gate_up, gate_up.shape[1] // 2) and (library := backend()) is not None:
        return cpu.silu_mul(library, gate_up)
    return reference.silu_mul(gate_up)


def silu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> Quantized:
    """`silu_mul` of [M, 2 S], quantized per row or group: [M, S]."""
    if cpu.fits(gate_up, gate_up.shape[1] // 2) and (library := backend()) is not None:
        return Quantized(*cpu.silu_mul_quantize(library, gate_up, group_size), gate_up.dtype)
    return Quantized(*reference.silu_mul_quantize(gate_up, group_size), gate_up.dtype)


def first_maxima(x: Tensor) -> Tensor:
    """Where the largest value of each row stands, the first of several. x: [M, S] without NaN; returns int64 [M]."""
    if cpu.fits(x, x.shape[1]) and (library := backend()) is not None:
        return cpu.first_maxima(library, x)
    # As argmax, which takes four times as long in bfloat16 on a CPU.
    return x.max(-1).indices


def rotary_write(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    start: int = 0,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate the queries and keys of a fused projection by their positions and store keys and values.

    qkv:      [R, (H + 2 H_kv) * D], queries first, then keys, then values
    rotation: cosines and sines, float32 [R, D]
    keys, values: a static cache [H_kv, capacity, D], written at slots ``start`` to ``start + R``
    norms:    weights [D] of an RMS norm with ``eps`` over each query and each key head, or None

    Returns the rotated queries, [R, H, D].
    """
    same = norms is None or norms[0].dtype == qkv.dtype
    if same and cpu.fits_heads(qkv, keys) and (library := backend()) is not None:
        return cpu.rotary_write(library, qkv, rotation, keys, values, start, norms, eps)
    return reference.rotary_write(qkv, rotation, keys, values, start, norms, eps)


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of a block over the context.

    q: [R, H, D]; keys, values: a static cache [H_kv, capacity, D]; visible: bool [R, S], True where a row sees one of
    the first S slots. Returns [R, H * D]. Query head h reads KV head h // (H / H_kv). On a CPU in bfloat16 a row's
    result depends neither on the other rows nor on slots that it does not see.
    """
    if cpu.fits_heads(q, keys) and (library := backend()) is not None:
        return cpu.attend(library, q, keys, values, visible)
    return reference.attend(q, keys, values, visible)
