"""The results file of the suite, which is written after every section."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

Json = dict[str, Any]

CLOSING_SECTIONS = ("simulation", "bars", "plots")
"""The closing sections. They take almost no time, need no device, and report the results of the others."""
DIED = "the process died in this section"


class TimeUp(BaseException):
    """Raised in a section at the end of the suite's time. It is not an Exception, because sections catch those."""


class Recorder:
    """Runs sections and writes ``results.json``. An exception in a section does not affect the next one.

    resume: continue the file of a process that died or whose device stopped answering, after its last section
    """

    def __init__(self, folder: Path, seconds: float, resume: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seconds = folder, seconds
        self.results: Json = {"sections": {}, "begin": time.time()}
        if resume:
            self.results = json.loads(self._file.read_text(encoding="utf-8"))

    def seconds_left(self) -> float:
        """Return the seconds until the suite must end. They are negative after that."""
        begin: float = self.results["begin"]
        return self.seconds - (time.time() - begin)

    def run(self, name: str, section: Callable[[], Any]) -> None:
        """Run a section and record its duration and its result or traceback.

        A section that an earlier process began is not begun again.
        """
        if name in self.results["sections"]:
            return
        begin = time.perf_counter()
        entry: Json = {"error": DIED}
        self.results["sections"][name] = entry
        self.write()
        try:
            if self.seconds_left() <= 0 and name not in CLOSING_SECTIONS:
                raise TimeUp
            with _alarm(None if name in CLOSING_SECTIONS else self.seconds_left()):
                result = section()
            entry["error"] = None
            if result is not None:
                self.results[name] = result
        except TimeUp:
            entry["error"] = f"the time was up after {time.perf_counter() - begin:.0f} s of this section"
        except Exception:
            entry["error"] = traceback.format_exc()
        entry["seconds"] = round(time.perf_counter() - begin, 2)
        outcome = "ok" if entry["error"] is None else entry["error"].strip().splitlines()[-1]
        print(f"{name:12} {entry['seconds']:7.1f} s  {outcome}", flush=True)
        self.write()

    def keep(self, name: str, partial: Any) -> None:
        """Record the results that a running section has so far."""
        self.results[name] = partial
        self.write()

    def write(self) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._file)

    def finish(self) -> int:
        """Return the exit code, which is 0 if no section failed and every kernel was correct."""
        failed = [name for name, entry in self.results["sections"].items() if entry["error"]]
        wrong = [case for case in self.results.get("correctness", {}).get("cases", []) if not case["correct"]]
        for case in wrong[:20]:
            print(f"WRONG {case}")
        print(f"wrote {self._file}; {len(failed)} sections failed, {len(wrong)} cases wrong")
        return 1 if failed or wrong else 0

    @property
    def _file(self) -> Path:
        return self.folder / "results.json"


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Raise `TimeUp` in the body after this time."""
    if seconds is None:
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
