"""The hooks of mkdocs.yml: generated pages, tables and numbers of committed results, formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from quasar.results.excerpts import refreshed
from scripts.docs import command_line, config_keys, memory, metrics_table, pairs
from scripts.docs.formulas import with_mathml
from scripts.docs.numbers import with_numbers

ROOT = Path(__file__).parents[2]
PAGES: dict[str, Callable[[], str]] = {
    "reference/configuration.md": config_keys.page,
    "reference/command-line.md": command_line.page,
    "reference/metrics.md": metrics_table.page,
    "reference/pairs.md": pairs.page,
}
"""The pages that are generated."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the figures of the committed results."""
    for place, page in PAGES.items():
        files.append(File.generated(config, place, content=page()))
    for file in sorted((ROOT / "experiments").glob("*/*.svg")):
        files.append(File.generated(config, f"results/{file.parent.name}/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Copy tables and numbers of committed results into a page."""
    text = refreshed(markdown, ROOT)
    return with_numbers(text, ROOT).replace("<!-- memory of the models -->", memory.table())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas of a page into MathML, which browsers show without a script."""
    return with_mathml(html)
