"""Checks of Python, PyTorch, the GPU, the memory, and of what else the machine is doing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from quasar.doctor.finding import Finding
from quasar.results.load import DISTURBED, Sample, load_of, sample, usable_cores

OLDEST, NEWEST = (3, 11), (3, 13)
LOW_MEMORY, LEAST_MEMORY = 3e9, 1e9
"""Available bytes below which only the smallest models fit, and below which none does."""
SECONDS = 0.5
"""How long other processes are watched."""
_MEMINFO = Path("/proc/meminfo")


def python() -> Iterator[Finding]:
    version = platform.python_version()
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        yield Finding("Python", "works", version)
    else:
        wanted = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        yield Finding("Python", "fails", version, f"use Python {wanted}")


def torch_and_gpu() -> Iterator[Finding]:
    import torch

    yield Finding("PyTorch", "works", f"{torch.__version__}; threads=null is {torch.get_num_threads()} here")
    if torch.cuda.is_available():
        yield from _gpu()
    elif shutil.which("nvidia-smi") is not None:
        build = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        found = f"PyTorch, built {build}, finds none, so that runs use the CPU, although nvidia-smi is installed"
        yield Finding("GPU", "falls back", found, "install a CUDA build of torch that fits the driver")
    else:
        yield Finding("GPU", "works", "none; runs use the CPU")


def _gpu() -> Iterator[Finding]:
    import torch
    from quasar_kernels.gpu import has_gpu_kernels

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    found = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {capability}, CUDA {torch.version.cuda}"
    if has_gpu_kernels(torch.empty(1, device=device)):
        yield Finding("GPU", "works", f"{found}, Triton kernels")
    else:
        yield Finding(
            "GPU",
            "falls back",
            f"{found}; PyTorch's operations, without Triton kernels",
            "pip install 'quasar-speculative[gpu]'; the kernels need compute capability 8.0",
        )


def memory() -> Iterator[Finding]:
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        yield Finding("memory", "works", "unknown: this system has no /proc/meminfo")
        return
    found = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"
    if available >= LOW_MEMORY:
        yield Finding("memory", "works", found)
        return
    remedy = "end other programs; evaluate.noise_floor=false saves a float32 copy of the model"
    yield Finding("memory", "fails" if available < LEAST_MEMORY else "falls back", found, remedy)


def load() -> Iterator[Finding]:
    begin = sample()
    time.sleep(SECONDS)
    end = sample()
    cores = len(usable_cores())
    if begin is None or end is None:
        yield Finding("load", "works", f"unknown: this system has no /proc/stat; {cores} of {os.cpu_count()} cores")
        return
    yield _load(begin, end, cores)


def _load(begin: Sample, end: Sample, cores: int) -> Finding:
    """Return what other processes do to the times of a run, given samples while this process waited."""
    load = load_of(begin, end, cores)
    free = cores * max(0.0, 1 - load.other_cpu_share - load.steal_share)
    found = f"load average {end.load_average:.2f}; {free:.1f} of {cores} cores are free"
    if max(load.other_cpu_share, load.steal_share) <= DISTURBED:
        return Finding("load", "works", found)
    remedy = "wait or end other programs: times that are measured now are not comparable"
    return Finding("load", "falls back", f"{found}; runs will be marked as disturbed", remedy)
