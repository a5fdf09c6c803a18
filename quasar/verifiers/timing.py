"""Times a single verification pass."""

from __future__ import annotations

from quasar.decoding.draft import Draft
from quasar.decoding.stopwatch import Stopwatch
from quasar.verifiers.base import Verifier


def pass_milliseconds(verifier: Verifier, last: int, draft: Draft) -> float:
    """Return the duration of one pass in milliseconds. The cache is the same afterwards, as nothing of it is kept."""
    clock = Stopwatch(verifier.device)
    verifier.verify(last, draft)
    clock.lap("verify")
    (milliseconds,) = clock.milliseconds()["verify"]
    return milliseconds
