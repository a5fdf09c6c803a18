"""The direction of imports."""

from __future__ import annotations

import ast
from pathlib import Path

QUASAR = Path(__file__).parents[1] / "quasar"
LAYERS = ("experiment", "results", "evaluation", "decoding", "model")
"""From top to bottom: each may import those that follow it."""


def test_no_layer_imports_one_above_it() -> None:
    wrong = [
        f"{file.relative_to(QUASAR)} imports {imported}"
        for place, layer in enumerate(LAYERS)
        for file in (QUASAR / layer).rglob("*.py")
        for imported in imports(file)
        if imported.startswith(tuple(f"quasar.{above}." for above in LAYERS[:place]))
    ]
    assert wrong == []


def imports(file: Path) -> list[str]:
    """The modules that a file imports, wherever in it; a name that is imported from a package counts as one."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name + "." for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found
