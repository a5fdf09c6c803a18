"""Description of the machine, code and packages that a run is measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from quasar_kernels.bandwidth import copy_bandwidth
from quasar_kernels.cpu import kernel_level

from quasar.results.attempt import Machine

CODE = ("quasar", "kernels", "conf", "hydra_plugins", "run.py", "pyproject.toml", "constraints.txt")
"""What a run is made of. Results and texts are not: publishing one experiment must not spoil the next one."""
PACKAGES = ("torch", "transformers", "hydra-core", "omegaconf", "triton", "bitsandbytes", "torch-pruning", "numpy")


def describe_machine(device: torch.device) -> Machine:
    """Describe this machine and the installed code and packages; measures the copy bandwidth of ``device``."""
    commit, dirty = _git()
    level, reason = kernel_level() if device.type == "cpu" else ("", "")
    return Machine(
        git_commit=commit,
        git_dirty=dirty,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        platform=platform.platform(),
        cpu=_cpu_name(),
        cpu_count=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=device_name(device),
        copy_bandwidth_bytes_per_second=copy_bandwidth(device),
        kernels=level,
        kernels_reason=reason,
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({_cpu_name()})"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes so far: allocated memory on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _git() -> tuple[str | None, bool | None]:
    """Return the commit and whether files of `CODE` differ from it; both are None if this code is in no repository."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed wheel may be inside a repository of another project.
    if git("ls-files", "--error-unmatch", __file__) is None:
        return None, None
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return git("rev-parse", "HEAD"), None if changes is None else bool(changes)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
