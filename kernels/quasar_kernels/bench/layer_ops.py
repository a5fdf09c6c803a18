"""Compares the ops between the matmuls with PyTorch's own operations, for the layers of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from quasar_kernels.bench.timing import alternating_medians, copies_of
from quasar_kernels.cases import LAYERS, Case, Setting
from quasar_kernels.dispatch import LayerOp
from quasar_kernels.ops import LAYER_OPS

CONTEXTS = (512, 4096)


@dataclass(frozen=True)
class LayerMeasurement:
    """The measurement of one op; times are medians of many calls.

    torch_milliseconds: time of PyTorch's own operations for the same, in the same run
    context: number of cached tokens that the op reads; None if it reads none
    bandwidth_fraction: bytes that must be read and written per second, as a fraction of the copy bandwidth of the run
    """

    op: str
    model: str
    context: int | None
    rows: int
    milliseconds: float
    torch_milliseconds: float
    speedup: float
    bandwidth_fraction: float


@torch.inference_mode()
def measure_layer(model: str, blocks: list[int], repetitions: int, bandwidth: float) -> Iterator[LayerMeasurement]:
    """Time all ops of one model's layer, for every number of rows."""
    for rows in blocks:
        for op in LAYER_OPS:
            for context in CONTEXTS if op.reads_cache else (None,):
                yield _measure(op, model, context, rows, repetitions, bandwidth)


def _measure(
    op: LayerOp, model: str, context: int | None, rows: int, repetitions: int, bandwidth: float
) -> LayerMeasurement:
    setting = Setting(LAYERS[model], rows, context or 0)
    first = op.case(setting)
    # In a real pass the activations that an op reads were just written and are cached, but the KV cache is not.
    copies = copies_of(2 * first.moved_bytes) if op.reads_cache else 1
    cases: list[Case] = [first, *(op.case(setting) for _ in range(copies - 1))]
    contenders: list[list[Callable[[], object]]] = [
        [partial(op, *case.arguments) for case in cases],
        [case.peer for case in cases],
    ]
    ours, theirs = alternating_medians(contenders, repetitions)
    fraction = first.moved_bytes / ours / bandwidth
    return LayerMeasurement(op.name, model, context, rows, ours * 1e3, theirs * 1e3, theirs / ours, fraction)
