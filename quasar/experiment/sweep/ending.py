"""The exception that ends a sweep with an exit code."""

from __future__ import annotations


class SweepEnded(SystemExit):
    """Raised at the end of a sweep with unfinished jobs. It is a SystemExit because Hydra does not catch those."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.exit_code = code
