"""Which cases of a test always run. The others repeat it with further values, and take minutes altogether."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def always(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the values as parameters of a test; those that are not ``kept`` run with ``make test-exhaustive`` only."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]
