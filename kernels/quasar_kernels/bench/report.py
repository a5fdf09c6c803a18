"""The tables and the plot of the benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from quasar_kernels.bench.layer_ops import LayerMeasurement
from quasar_kernels.bench.matmuls import BASELINE, Measurement
from quasar_kernels.ops import MATMULS


def matmul_tables(found: list[Measurement], blocks: list[int]) -> Iterator[Table]:
    """Return one table per matrix, with one row per backend."""
    for outputs, inputs in dict.fromkeys((one.outputs, one.inputs) for one in found):
        here = [one for one in found if (one.outputs, one.inputs) == (outputs, inputs)]
        table = Table("", *[f"M = {rows}" for rows in blocks], title=f"{outputs} × {inputs}", title_justify="left")
        for backend in dict.fromkeys(one.backend for one in here):
            cells = [
                f"{one.milliseconds:.3f} ({one.speedup:.1f}x, {one.bandwidth_fraction:.0%})"
                for one in here
                if one.backend == backend
            ]
            table.add_row(backend, *cells)
        yield table


def layer_tables(found: list[LayerMeasurement], blocks: list[int]) -> Iterator[Table]:
    """Return one table per model, with one row per op and context length."""
    for model in dict.fromkeys(one.model for one in found):
        here = [one for one in found if one.model == model]
        table = Table("", *[f"M = {rows}" for rows in blocks], title=model, title_justify="left")
        for op, context in dict.fromkeys((one.op, one.context) for one in here):
            cells = [
                f"{one.milliseconds:.4f} ({one.speedup:.1f}x)" for one in here if (one.op, one.context) == (op, context)
            ]
            table.add_row(op if context is None else f"{op}, context {context}", *cells)
        yield table


def plot(found: list[Measurement], blocks: list[int], path: Path) -> None:
    """Plot the speedup over the baseline against the number of rows, with one panel per matrix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matrices = list(dict.fromkeys((one.outputs, one.inputs) for one in found))
    columns = min(3, len(matrices))
    figure, axes = plt.subplots(
        math.ceil(len(matrices) / columns), columns, figsize=(5 * columns, 3.6 * math.ceil(len(matrices) / columns)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(matrices) :]:
        axis.remove()
    for axis, (outputs, inputs) in zip(axes.flat, matrices, strict=False):
        here = [one for one in found if (one.outputs, one.inputs) == (outputs, inputs)]
        for backend in dict.fromkeys(one.backend for one in here):
            ours = backend in {op.format for op in MATMULS}
            speedups = [one.speedup for one in here if one.backend == backend]
            axis.plot(blocks, speedups, "-o" if ours else "--", label=backend, linewidth=2 if ours else 1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(blocks, [str(rows) for rows in blocks])
        axis.set(title=f"{outputs} × {inputs}", xlabel="rows M", ylabel=f"speedup over {BASELINE}")
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
