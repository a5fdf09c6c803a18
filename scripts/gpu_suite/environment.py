"""Describes the machine that the suite ran on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from quasar_kernels.bandwidth import copy_bandwidth

from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json

PACKAGES = ("torch", "triton", "transformers", "numpy", "bitsandbytes", "torchao")


def measure(plan: Plan) -> Json:
    """Return versions, the device, and the copy bandwidth that all fractions refer to."""
    facts: Json = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--", "quasar", "kernels", "scripts")),
        "device": str(plan.device),
        "tiny": plan.tiny,
        "copy_bandwidth_bytes_per_second": None,
    }
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "clocks": _output(
                "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"
            ),
            "copy_bandwidth_bytes_per_second": copy_bandwidth(plan.device),
        }
    return facts


def answers() -> bool:
    """Return whether the CUDA context of this process still works. An illegal access breaks it permanently."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parents[2]), *arguments)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
