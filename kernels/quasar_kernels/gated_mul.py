"""What the ops of gated activations share: everything but the activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp, in_16_bit, triton_function, triton_groups
from quasar_kernels.reference import quantize_tokens


def gated_mul(
    name: str, activation: Callable[[Tensor], Tensor], cpu: Callable[..., Any], cpu_quantizing: Callable[..., Any]
) -> tuple[LayerOp, LayerOp]:
    """Return the op ``activation(gate) * up`` and the one that quantizes its result by `reference.quantize_tokens`.

    name: of the op and of its function in `triton.activation`; with ``_quantize`` behind it, those of the second op
    cpu, cpu_quantizing: the functions of `cpu.calls`
    """

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    def plain_quantizing(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
        return quantize_tokens(plain(gate_up), group_size)

    def case(setting: Setting) -> Case:
        gate_up = setting.normal(setting.rows, 2 * setting.layer.intermediate)
        return Case((gate_up,), lambda: plain(gate_up), gate_up.nbytes * 3 // 2)

    def quantizing_case(setting: Setting) -> Case:
        gate_up = setting.normal(setting.rows, 2 * setting.layer.intermediate)
        arguments = gate_up, setting.group_size
        return Case(arguments, lambda: plain_quantizing(*arguments), gate_up.nbytes * 5 // 4)

    op = LayerOp(
        name,
        plain=plain,
        cpu=Kernel(_library_takes, cpu),
        triton=Kernel(in_16_bit, triton_function("activation", name)),
        case=case,
        check=checks.gated_mul,
    )
    quantizing = LayerOp(
        f"{name}_quantize",
        plain=plain_quantizing,
        cpu=Kernel(_library_takes, cpu_quantizing),
        triton=Kernel(_triton_quantizes, triton_function("activation", f"{name}_quantize")),
        case=quantizing_case,
        check=checks.gated_mul,
    )
    return op, quantizing


def _library_takes(gate_up: Tensor, group_size: int | None = None) -> bool:
    return calls.fits(gate_up, group_size or gate_up.shape[1] // 2)


def _triton_quantizes(gate_up: Tensor, group_size: int | None = None) -> bool:
    return in_16_bit(gate_up) and triton_groups(group_size)
