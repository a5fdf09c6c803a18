"""Which cases of a test run when. The fast suite, ``make test``, has some of every kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def always(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the values as parameters of a test; those that are not ``kept`` run with ``make test-exhaustive`` only.

    They repeat the test with further values, and take half an hour altogether.
    """
    return _marked(values, kept, pytest.mark.exhaustive)


def fast(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the values as parameters of a test; those that are not ``kept`` run with the slow tests.

    They reach code that the others do not, but take minutes altogether.
    """
    return _marked(values, kept, pytest.mark.slow)


def _marked(values: Iterable[Any], kept: tuple[Any, ...], mark: pytest.MarkDecorator) -> list[Any]:
    return [value if value in kept else pytest.param(value, marks=mark) for value in values]
