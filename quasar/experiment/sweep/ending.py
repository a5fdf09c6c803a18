"""How a multirun ends: with an exit code that Hydra lets through."""

from __future__ import annotations


class SweepEnded(SystemExit):
    """Raised at the end of a sweep that is not done. Hydra handles exceptions by itself, but not SystemExit."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.exit_code = code
