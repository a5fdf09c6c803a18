"""The header that a run prints before its first prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quasar_kernels.cpu.levels import NO_KERNELS

from quasar.config.schema import Grid, warnings_about
from quasar.experiment.build import Prepared
from quasar.results.console import Reporter
from quasar.results.schema import Machine

MOSTLY_ON_GRID = 0.5
"""Share of weights on a low-bit grid from which on a reference counts as dequantized."""


def print_header(reporter: Reporter, parts: Prepared, finished: int, folder: Path) -> None:
    """Print model, drafter, verifier, device, prompts and output folder.

    finished: number of prompts that an earlier attempt has already decoded
    """
    settings, checkpoint, verifier = parts.settings, parts.checkpoint, parts.verifier
    dtype = str(verifier.dtype).removeprefix("torch.")
    lossless = f"; lossless with respect to the {verifier.label}, not to the reference"
    exact = settings.decode.acceptance == "exact"
    entries = {
        "model": f"{checkpoint.name}, weights from {checkpoint.origin}",
        "drafter": "; ".join([_describe(settings.drafter), *parts.drafter.details]),
        "verifier": "; ".join([_describe({**settings.verifier, "dtype": dtype}), *verifier.details])
        + (lossless if exact and not verifier.is_reference else ""),
        **({} if exact else {"decode": "typical acceptance: lossy, it does not preserve the verifier's distribution"}),
        "device": parts.machine.name + _kernels(parts.machine),
        "prompts": f"{len(parts.prompts)} from data={settings.data.name}"
        + (f", {finished} already done" if finished else ""),
        **({} if parts.isolation is None else {"sandbox": f"generated code is isolated by {parts.isolation}"}),
        "output": str(folder),
    }
    reporter.header(entries)
    for text in warnings_about(settings):
        reporter.warning(text)
    if parts.weights_on_grid is not None and parts.weights_on_grid > MOSTLY_ON_GRID:
        reporter.warning(
            f"the reference was dequantized: {parts.weights_on_grid:.0%} of its weights lie on a low-bit grid; "
            "a verifier that quantizes to the same grid is not a compression of it"
        )
    if checkpoint.grid is not None and _on_grid(settings.verifier, checkpoint.grid):
        reporter.warning(
            f"these weights are already on a 4-bit grid in groups of {checkpoint.grid.group_size}, and verifier=int4 "
            "reproduces this grid at these settings. It is lossless here, but this does not show how lossy quantizing "
            "the original model would be"
        )


def _kernels(machine: Machine) -> str:
    """Return the level of the CPU kernels and why it is this one; an empty text for a GPU."""
    if not machine.kernels:
        return ""
    level = "no" if machine.kernels == NO_KERNELS else machine.kernels
    return f", {level} kernels ({machine.kernels_reason})"


def _on_grid(verifier: dict[str, Any], grid: Grid) -> bool:
    """Whether quantization with these settings represents every weight of the grid exactly."""
    same = verifier["name"] == "int4" and grid.bits == 4 and verifier.get("symmetric") == grid.symmetric
    return same and grid.group_size % int(verifier.get("group_size", 1)) == 0


def _describe(node: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in node.items() if key not in ("_target_", "name"))
    return node["name"] + (f" ({options})" if options else "")
