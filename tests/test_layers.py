"""Imports point in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

QUASAR = Path(__file__).parents[1] / "quasar"
LAYERS = (
    ("cli",),
    ("experiment", "testing", "doctor"),
    ("drafters",),
    ("results",),
    ("evaluation",),
    ("verifiers",),
    ("decoding", "pruning"),
    ("quantization",),
    ("model",),
    ("config", "cache"),
    ("errors",),
)
"""The layers from top to bottom. A part may import parts of the lines below, but none of its own line or above."""


def test_no_part_imports_one_above_it_or_beside_it() -> None:
    rank = {part: place for place, parts in enumerate(LAYERS) for part in parts}
    names = {path.stem for path in QUASAR.iterdir() if path.suffix in ("", ".py")}
    parts = names - {"__init__", "__pycache__"}
    assert parts == set(rank), "a new part of the program has a place among the others"
    wrong = [
        f"{file.relative_to(QUASAR)} imports {imported}"
        for part in parts
        for file in ([QUASAR / f"{part}.py"] if (QUASAR / f"{part}.py").exists() else (QUASAR / part).rglob("*.py"))
        for imported in imports(file)
        if imported.startswith("quasar.")
        for other in [imported.split(".")[1]]
        if other != part and rank[other] <= rank[part]
    ]
    assert wrong == []


def test_the_kernels_import_nothing_of_the_program() -> None:
    kernels = QUASAR.parent / "kernels" / "quasar_kernels"
    wrong = [file.name for file in kernels.rglob("*.py") if any(name.startswith("quasar.") for name in imports(file))]
    assert wrong == []


def imports(file: Path) -> list[str]:
    """Return all modules that a file imports. A name that is imported from a package counts as a module."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name + "." for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found
