"""The outermost frame of the program: an interrupt and a closed standard output end it quietly at any moment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130


def guarded(program: Callable[[], int]) -> int:
    """Call ``program`` and return its exit code, which is 130 after an interrupt (Ctrl-C).

    The program imports what it needs itself, because an interrupt may come during the imports. An import may turn
    KeyboardInterrupt into another error, so the signal itself is noted.
    """
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    # A shell starts background jobs with interrupts ignored, and they must stay ignored.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = program()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:
        if not interrupts:
            raise
        code = INTERRUPTED
    if interrupts:
        # Another interrupt while the interpreter ends would change the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = code and INTERRUPTED
    _flush()
    return code


def _flush() -> None:
    """Write the rest of standard output, unless its reader has closed it (``--help | head``)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends, which must not fail then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
