"""Every product and backend over the matrices of real models: time, speedup over BF16, share of the copy bandwidth.

    python -m kernels.bench --shapes 4096x4096 --rows 1,8 --output /tmp/bench

All backends take turns, call by call, so that a change in the machine's speed meets all of them alike; each has so
many copies of its weights that no cache holds them until their next turn.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import kernels
from kernels import DenseWeight, Int4Weight, Int8Weight, cpu, reference

# Outputs and inputs of the fused projections: QKV, output, gate and up, down, head.
MODELS = {
    "smollm2-135m": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
    "qwen3-0.6b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)],
    "qwen3-8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)],
}
# All of them but the head of the largest, which takes gigabytes and minutes.
DEFAULT_SHAPES = "4096x4096,smollm2-135m,qwen3-0.6b,6144x4096,24576x4096,4096x12288"
GROUP_SIZE = 64
BASELINE = "torch bf16"
# Weights of all backends together that are read between two uses of the same copy: several last-level caches.
ROTATED_BYTES = 160 << 20
COPY_BYTES = 256 << 20
WARM_UP_ROUNDS = 2

Product = Callable[[Tensor], Tensor]
app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Backend:
    """prepare: a weight, bfloat16 [N, K], becomes a product with it; bits: stored per weight, with its scales."""

    name: str
    prepare: Callable[[Tensor], Product]
    bits: float


@dataclass(frozen=True)
class Measurement:
    """Medians of many calls; bandwidth_fraction is of the weights alone, against the copy bandwidth of the run."""

    backend: str
    outputs: int
    inputs: int
    rows: int
    milliseconds: float
    speedup: float
    bandwidth_fraction: float


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help="NxK or a model's name, comma separated, or all")] = DEFAULT_SHAPES,
    rows: Annotated[str, typer.Option(help="tokens of a block, comma separated")] = "1,2,4,8,16,32",
    repetitions: Annotated[int, typer.Option(min=1, help="timed calls per backend, shape and block")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="default: what PyTorch takes")] = None,
    output: Annotated[Path, typer.Option(help="folder of the results")] = Path("experiments/kernels"),
) -> None:
    """Measure the products on this machine's CPU and write table, JSON and plot."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    matrices, blocks = _matrices(shapes), [int(part) for part in rows.split(",")]
    bandwidth = copy_bandwidth()
    found: list[Measurement] = []
    for outputs, inputs in track(matrices, "matrices", console=console, transient=True):
        found += measure(backends(), outputs, inputs, blocks, repetitions, bandwidth)
    library = cpu.backend()
    report = {
        "cpu": _cpu_name(),
        "level": library.level.name if library else "torch",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "group_size": GROUP_SIZE,
        "repetitions": repetitions,
        "copy_bandwidth_bytes_per_second": bandwidth,
        "measurements": [asdict(one) for one in found],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _plot(found, blocks, output / "cpu.png")
    recorder = Console(record=True, width=120)
    recorder.print(f"{report['cpu']}, {report['threads']} threads, level {report['level']}, torch {torch.__version__}")
    recorder.print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; W4 in groups of {GROUP_SIZE}; milliseconds per call,")
    recorder.print("in brackets the speedup over torch's BF16 linear and the weights' share of the copy bandwidth")
    for table in _tables(found, blocks):
        recorder.print(table)
    (output / "cpu.txt").write_text(recorder.export_text(), encoding="utf-8")


def copy_bandwidth() -> float:
    """Bytes read and written per second while copying a buffer larger than any cache; median of several copies."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)
    return 2 * COPY_BYTES / statistics.median(_seconds(lambda: target.copy_(source)) for _ in range(9))


def backends() -> list[Backend]:
    """The baseline, our products, and the peers that are installed."""
    group_bits = 4 + 16 / GROUP_SIZE
    return [
        Backend(BASELINE, lambda weight: lambda x: F.linear(x, weight), 16),
        Backend("bf16", _dense, 16),
        Backend("w8a8", _w8a8, 8),
        Backend("w4a8", lambda weight: _w4(weight, kernels.linear_w4a8), group_bits),
        Backend("w4a16", lambda weight: _w4(weight, kernels.linear_w4a16), group_bits),
        Backend("torch int8pack", _torch_int8, 8),
        Backend("torch int4pack", _torch_int4, group_bits + 16 / GROUP_SIZE),
        Backend("onednn w8a8", _onednn_w8a8, 8),
        *_bitsandbytes(),
    ]


def measure(
    candidates: list[Backend], outputs: int, inputs: int, blocks: list[int], repetitions: int, bandwidth: float
) -> Iterator[Measurement]:
    """Time all backends on one matrix [outputs, inputs], for every number of rows."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    round_bytes = sum(outputs * inputs * backend.bits / 8 for backend in candidates)
    copies = max(2, math.ceil(ROTATED_BYTES / round_bytes))
    # Dense backends would share one tensor: each copy needs its own.
    products = [[backend.prepare(weight.clone()) for _ in range(copies)] for backend in candidates]
    for rows in blocks:
        x = torch.randn(rows, inputs, dtype=torch.bfloat16)
        times: list[list[float]] = [[] for _ in candidates]
        for turn in range(WARM_UP_ROUNDS + repetitions):
            for index, copied in enumerate(products):
                times[index].append(_seconds(partial(copied[turn % copies], x)))
        medians = [statistics.median(one[WARM_UP_ROUNDS:]) for one in times]
        for backend, median in zip(candidates, medians, strict=True):
            fraction = outputs * inputs * backend.bits / 8 / median / bandwidth
            yield Measurement(backend.name, outputs, inputs, rows, median * 1e3, medians[0] / median, fraction)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _dense(weight: Tensor) -> Product:
    packed = DenseWeight.prepare(weight)
    return lambda x: kernels.linear_bf16(x, packed)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.float().abs().amax(1) / reference.INT8_MAX
    return torch.round(weight.float() / scales.unsqueeze(1)).to(torch.int8), scales


def _w8a8(weight: Tensor) -> Product:
    packed = Int8Weight.prepare(*_int8(weight))
    return lambda x: kernels.linear_w8a8(x, packed)


def _w4(weight: Tensor, product: Callable[[Tensor, Int4Weight], Tensor]) -> Product:
    values, scales = _int4(weight)
    packed = Int4Weight.prepare(
        reference.pack_int4(values), scales, torch.full_like(scales, 8), symmetric=True, dtype=torch.bfloat16
    )
    return lambda x: product(x, packed)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    scales = groups.abs().amax(2) / 7
    values = torch.round(groups / scales.unsqueeze(2)) + 8
    return values.to(torch.uint8).view(weight.shape), scales


def _torch_int8(weight: Tensor) -> Product:
    values, scales = _int8(weight)
    scales = scales.to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, values, scales)


def _torch_int4(weight: Tensor) -> Product:
    values, scales = _int4(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1)
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, pairs)


def _onednn_w8a8(weight: Tensor) -> Product:
    values, scales = _int8(weight)
    packed = torch.ops.onednn.qlinear_prepack(values, None)
    zeros = torch.zeros(len(scales), dtype=torch.int32)

    def product(x: Tensor) -> Tensor:
        tokens, token_scales = reference.quantize_tokens(x)
        # Without AMX only unsigned activations, here with zero point 128, have a fast kernel.
        tokens = (tokens.view(torch.uint8) ^ 128).contiguous()
        out = torch.ops.onednn.qlinear_pointwise(
            tokens, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (out * token_scales).to(x.dtype)

    return product


def _bitsandbytes() -> list[Backend]:
    try:
        import logging

        # On a CPU it looks for a package that is named like ours, and would log that it is not the one it wanted.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes
    except ImportError:
        return []
    layers: Any = bitsandbytes.nn

    def nf4(weight: Tensor) -> Product:
        options = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": False}
        layer = layers.Linear4bit(*reversed(weight.shape), bias=False, device="meta", **options)
        layer.weight = layers.Params4bit(
            weight, requires_grad=False, blocksize=GROUP_SIZE, compress_statistics=False, quant_type="nf4"
        )
        return layer.to("cpu").eval()

    def int8(weight: Tensor) -> Product:
        layer = layers.Linear8bitLt(
            *reversed(weight.shape), bias=False, has_fp16_weights=False, threshold=0.0, device="meta"
        )
        layer.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu").eval()

    return [Backend("bitsandbytes nf4", nf4, 4 + 32 / GROUP_SIZE), Backend("bitsandbytes int8", int8, 8)]


def _matrices(shapes: str) -> list[tuple[int, int]]:
    names = list(MODELS) if shapes == "all" else shapes.split(",")
    found: list[tuple[int, int]] = []
    for name in names:
        if name in MODELS:
            found += MODELS[name]
            continue
        try:
            outputs, inputs = map(int, name.split("x"))
        except ValueError:
            choices = ", ".join(["all", *MODELS])
            raise typer.BadParameter(f"--shapes {name}: neither OUTPUTSxINPUTS nor one of {choices}") from None
        if outputs % 32 or inputs % GROUP_SIZE:
            raise typer.BadParameter(f"--shapes {name}: outputs must be a multiple of 32, inputs of {GROUP_SIZE}")
        found.append((outputs, inputs))
    return list(dict.fromkeys(found))


def _tables(found: list[Measurement], blocks: list[int]) -> Iterator[Table]:
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


def _plot(found: list[Measurement], blocks: list[int], path: Path) -> None:
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
            ours = backend in {"bf16", "w8a8", "w4a8", "w4a16"}
            speedups = [one.speedup for one in here if one.backend == backend]
            axis.plot(blocks, speedups, "-o" if ours else "--", label=backend, linewidth=2 if ours else 1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(blocks, [str(rows) for rows in blocks])
        axis.set(title=f"{outputs} × {inputs}", xlabel="rows M", ylabel=f"speedup over {BASELINE}")
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    app()
