"""The page of all metrics, made from the table in quasar/results/metrics.py and the docstrings beside it."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache

from quasar.results.measured import Measured, RunFacts
from quasar.results.metric import Metric
from quasar.results.metrics import METRICS
from scripts.docs.markdown import escaped, row, table_head

_INTRODUCTION = """# Metrics

The rows of `METRICS` in `quasar/results/metrics.py`, from which the table of a run, `summary.json`, the columns of
`quasar collect` and the curves in Weights & Biases are made. A metric that a run did not measure is null.
[Speculative decoding](../explanation/speculative-decoding.md) explains how to read them.
"""
_ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): (.*(?:\n {4}.*)*)", re.MULTILINE)


def page() -> str:
    """Return the page in Markdown."""
    lines = [_INTRODUCTION, table_head("metric", "heading", "unit", "better", "meaning")]
    for metric in METRICS:
        name = f"`{metric.name}`" + ("" if metric.in_summary else " (not in `summary.json`)")
        lines.append(row(name, metric.heading, metric.unit, metric.better or "", escaped(meaning(metric))))
    return "\n".join(lines) + "\n"


def meaning(metric: Metric) -> str:
    """Return what a metric is: the docstring of its function, or of the attribute that a lambda returns."""
    if metric.compute.__name__ != "<lambda>":
        text = inspect.getdoc(metric.compute) or ""
    else:
        text = _attributes().get(metric.name, "")
    # Docstrings mark code by two backquotes or name objects of Python by one.
    return " ".join(text.replace("``", "`").split())


@lru_cache(maxsize=1)
def _attributes() -> dict[str, str]:
    """Return the lines ``names: meaning`` in the docstrings of the classes that metrics are computed from."""
    found: dict[str, str] = {}
    for cls in (Measured, RunFacts):
        for names, text in _ARGUMENT.findall(inspect.getdoc(cls) or ""):
            found.update(dict.fromkeys(names.split(", "), text))
    return found
