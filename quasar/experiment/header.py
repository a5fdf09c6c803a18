"""The header that a run prints before its first prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quasar_kernels.cpu.levels import NO_KERNELS

from quasar.config.rules import warnings_about
from quasar.config.schema import Grid
from quasar.experiment.build import Prepared
from quasar.results.attempt import Environment, Machine
from quasar.results.console import Reporter

MOSTLY_ON_GRID = 0.5
"""A reference counts as dequantized if more than this share of its weights is on a low-bit grid."""


def print_header(reporter: Reporter, environment: Environment, finished: int, folder: Path) -> None:
    """Print the header of a run, its warnings, and where its files are.

    finished: number of prompts that an earlier attempt has already decoded
    """
    entries = dict(environment.header)
    if finished:
        entries["prompts"] += f", {finished} already done"
    reporter.header({**entries, "output": str(folder)})
    for text in environment.warnings:
        reporter.warning(text)


def header_of(parts: Prepared) -> dict[str, str]:
    """Return the header's entries by title: model, drafter, verifier, device and prompts."""
    settings, checkpoint, rule = parts.settings, parts.checkpoint, parts.rule
    return {
        "model": f"{checkpoint.name}, weights from {checkpoint.origin}",
        "drafter": "; ".join([_describe(settings.drafter), *parts.drafter.details]),
        "verifier": _verifier(parts),
        **({"decode": rule.description} if rule.description else {}),
        "device": parts.machine.name + _kernels(parts.machine),
        "prompts": f"{len(parts.prompts)} from data={settings.data.name}" + _continued(parts),
        **({} if parts.isolation is None else {"sandbox": f"generated code is isolated by {parts.isolation}"}),
    }


def warnings_of(parts: Prepared) -> list[str]:
    """Return the warnings below the header: what the settings or the model's weights do to the results."""
    found = list(warnings_about(parts.settings))
    checkpoint = parts.checkpoint
    if parts.weights_on_grid is not None and parts.weights_on_grid > MOSTLY_ON_GRID:
        found.append(
            f"the reference was dequantized: {parts.weights_on_grid:.0%} of its weights lie on a low-bit grid; "
            "a verifier that quantizes to the same grid is not a compression of it"
        )
    if checkpoint.grid is not None and stores_exactly(parts.settings.verifier, checkpoint.grid):
        found.append(
            f"these weights are already on a 4-bit grid in groups of {checkpoint.grid.group_size}, and verifier=int4 "
            "reproduces this grid at these settings. It is lossless here, but this does not show how lossy quantizing "
            "the original model would be"
        )
    return found


def _verifier(parts: Prepared) -> str:
    """Describe the verifier, and with respect to what its output is lossless."""
    verifier, rule = parts.verifier, parts.rule
    dtype = str(verifier.dtype).removeprefix("torch.")
    said = [_describe({**parts.settings.verifier, "dtype": dtype}), *verifier.details]
    if not verifier.rows_are_independent:
        said.append("the rows of a pass depend on each other, so that drafts may change the output")
    if not (verifier.is_reference or rule.lossy or rule.simulated):
        said.append(f"lossless with respect to the {verifier.label}, not to the reference")
    return "; ".join(said)


def _continued(parts: Prepared) -> str:
    """Say that a base model continues the prompts; an empty text for a model with a chat template."""
    return "" if parts.tokenizer.has_chat_template else ", continued as they are: a base model, without a chat template"


def _kernels(machine: Machine) -> str:
    """Return the level of the CPU kernels and why it is this one; an empty text for a GPU."""
    if not machine.kernels:
        return ""
    level = "no" if machine.kernels == NO_KERNELS else machine.kernels
    return f", {level} kernels ({machine.kernels_reason})"


def stores_exactly(verifier: dict[str, Any], grid: Grid) -> bool:
    """Whether int4 with these settings stores every weight of the grid exactly and changes nothing else either."""
    same = verifier["name"] == "int4" and grid.bits == 4 and verifier.get("symmetric") == grid.symmetric
    return (
        same
        and grid.group_size % int(verifier.get("group_size", 1)) == 0
        and verifier.get("method") != "awq"  # scales the channels first
        and verifier.get("rotation") == "none"
        and not verifier.get("keep_8bit")
        and verifier.get("bits") is None
        and all(verifier.get(key) == 16 for key in ("activation_bits", "lm_head_bits", "kv_bits"))
    )


def _describe(node: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in node.items() if key not in ("_target_", "name"))
    return node["name"] + (f" ({options})" if options else "")
