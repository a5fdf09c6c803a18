"""The suite's one results file, on disk after every section."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Recorder:
    """Runs sections and writes ``results.json``; nothing that a section raises reaches the next one."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.results: Json = {"sections": {}}
        self._begin, self.seconds = time.perf_counter(), seconds

    def seconds_left(self) -> float:
        """Until the suite must end; negative after it."""
        return self.seconds - (time.perf_counter() - self._begin)

    def run(self, name: str, section: Callable[[], Any]) -> None:
        """Carry out a section and record its result, or its traceback, and how long it took."""
        begin = time.perf_counter()
        entry: Json = {"error": None}
        self.results["sections"][name] = entry
        try:
            if self.seconds_left() <= 0 and name not in ("bars", "plots"):
                entry["error"] = "not started: the time was up"
            else:
                result = section()
                if result is not None:
                    self.results[name] = result
        except Exception:
            entry["error"] = traceback.format_exc()
        entry["seconds"] = round(time.perf_counter() - begin, 2)
        outcome = "ok" if entry["error"] is None else entry["error"].strip().splitlines()[-1]
        print(f"{name:12} {entry['seconds']:7.1f} s  {outcome}", flush=True)
        self.write()

    def keep(self, name: str, partial: Any) -> None:
        """Record what a running section has so far."""
        self.results[name] = partial
        self.write()

    def write(self) -> None:
        file = self.folder / "results.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)

    def finish(self) -> int:
        """The exit code: 0 where every section ended well and every kernel was correct."""
        failed = [name for name, entry in self.results["sections"].items() if entry["error"]]
        wrong = [case for case in self.results.get("correctness", {}).get("cases", []) if not case["correct"]]
        for case in wrong[:20]:
            print(f"WRONG {case}")
        print(f"wrote {self.folder / 'results.json'}; {len(failed)} sections failed, {len(wrong)} cases wrong")
        return 1 if failed or wrong else 0
