"""Measures every op and backend with the matrices and layers of real models. `main` names the files that it writes.

    python -m quasar_kernels.bench --shapes 4096x4096 --rows 1,8 --output /tmp/bench

All contenders take turns, call by call, so that a change in the machine's speed meets all of them alike; each has so
many copies of its weights or cache that none is still cached at its next turn.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from quasar_kernels import cpu
from quasar_kernels.bandwidth import copy_bandwidth
from quasar_kernels.bench.layer_ops import LayerMeasurement, measure_layer
from quasar_kernels.bench.matmuls import DEFAULT_SHAPES, GROUP_SIZE, Measurement, backends, matrices_of, measure
from quasar_kernels.bench.report import layer_tables, matmul_tables, plot
from quasar_kernels.cases import LAYERS

app = typer.Typer(add_completion=False)
console = Console()


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help="NxK or a model's name, comma separated, or all")] = DEFAULT_SHAPES,
    rows: Annotated[str, typer.Option(help="tokens of a block, comma separated")] = "1,2,4,8,16,32",
    layers: Annotated[
        str, typer.Option(help="models of the ops between the matmuls, comma separated; may be empty")
    ] = ",".join(LAYERS),
    repetitions: Annotated[int, typer.Option(min=1, help="timed calls per backend, shape and block")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="default: what PyTorch takes")] = None,
    output: Annotated[Path, typer.Option(help="folder of the results")] = Path("experiments/kernels"),
) -> None:
    """Measure matmuls and the ops between them on this machine's CPU; write cpu.txt, cpu.json and cpu.png."""
    if threads is not None:
        torch.set_num_threads(threads)
    matrices, blocks = matrices_of(shapes), [int(part) for part in rows.split(",")]
    chosen = [name for name in layers.split(",") if name]
    if unknown := set(chosen) - set(LAYERS):
        raise typer.BadParameter(f"--layers {', '.join(sorted(unknown))}: there are {', '.join(LAYERS)}")
    bandwidth = copy_bandwidth(torch.device("cpu"))
    found: list[Measurement] = []
    for outputs, inputs in track(matrices, "matrices", console=console, transient=True):
        found += measure(backends(), outputs, inputs, blocks, repetitions, bandwidth)
    between: list[LayerMeasurement] = []
    for model in track(chosen, "ops between", console=console, transient=True):
        between += measure_layer(model, blocks, repetitions, bandwidth)
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
        "layer_ops": [asdict(one) for one in between],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(found, blocks, output / "cpu.png")
    recorder = Console(record=True, width=120)
    recorder.print(f"{report['cpu']}, {report['threads']} threads, level {report['level']}, torch {torch.__version__}")
    recorder.print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; W4 in groups of {GROUP_SIZE}; milliseconds per call,")
    recorder.print("in brackets the speedup over torch's BF16 linear and the weights' share of the copy bandwidth")
    for table in matmul_tables(found, blocks):
        recorder.print(table)
    recorder.print("Ops between the matmuls: milliseconds per call, in brackets the speedup over PyTorch's operations")
    for table in layer_tables(between, blocks):
        recorder.print(table)
    (output / "cpu.txt").write_text(recorder.export_text(), encoding="utf-8")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    app()
