"""The matrix of drafters and verifiers: whose output a pair reproduces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quasar.config.component import class_named
from quasar.config.schema import CONF
from quasar.experiment.catalogue import description
from scripts.docs.markdown import escaped, row, table_head
from scripts.docs.yaml_keys import keys

REFERENCE, ITSELF, SIMULATED = "exact", "own", "simulated"
LEGEND = (
    f"**{REFERENCE}**: the output is that of autoregressive decoding with the reference. **{ITSELF}**: it is that of "
    "autoregressive decoding with this verifier, which is not the reference, so it is lossy with respect to the "
    f"reference. **{SIMULATED}**: acceptance is replayed from a recorded run, and the text means nothing. All of this "
    "holds for `decode.acceptance=exact`, the default, greedily token by token and sampled in distribution."
)


def explained_matrix() -> str:
    """Return the table of all pairs with what its words mean and where they run."""
    return f"{matrix()}\n\n{LEGEND} {_devices()}"


def _devices() -> str:
    everywhere = ("cpu", "cuda")
    others = [
        f"`{group}={file.stem}` on {' and '.join(_target(file, group).devices)} only"
        for group in ("drafter", "verifier")
        for file in _files(group)
        if _target(file, group).devices != everywhere
    ]
    return f"All of them run on CPUs and on NVIDIA GPUs{', but ' if others else ''}{', '.join(others)}."


def matrix() -> str:
    """Return the table of all pairs of conf/drafter and conf/verifier, the reference first."""
    verifiers = sorted(_files("verifier"), key=lambda file: not _target(file, "verifier").is_reference)
    head = table_head("drafter", *(f"`{file.stem}`" for file in verifiers))
    lines = (
        row(f"`{drafter.stem}`", *(_guarantee(drafter, verifier) for verifier in verifiers))
        for drafter in _files("drafter")
    )
    return "\n".join([head, *lines])


def page() -> str:
    """Return the page of all drafters and verifiers in Markdown."""
    parts = [f"# Drafters and verifiers\n\nEvery drafter runs with every verifier.\n\n{explained_matrix()}\n"]
    for group in ("drafter", "verifier"):
        lines = [f"## {group.capitalize()}s\n", table_head(group, "what it is")]
        lines += [row(f"`{file.stem}`", escaped(description(file))) for file in _files(group)]
        parts.append("\n".join(lines) + "\n")
    parts.append("[Configuration](configuration.md) lists their keys.\n")
    return "\n".join(parts)


def _files(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


def _guarantee(drafter: Path, verifier: Path) -> str:
    if _target(drafter, "drafter").simulates:
        return SIMULATED
    return REFERENCE if _target(verifier, "verifier").is_reference else ITSELF


def _target(file: Path, group: str) -> Any:
    """Return the class that a YAML file names."""
    (target,) = (key.default for key in keys(file) if key.path == "_target_")
    return class_named(target, f"{group}._target_")
