"""Runs every section separately. A failure is recorded with its traceback, and all measurements are kept."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

TUNING_SHARE = 0.25
"""Share of the remaining time, at the beginning of tuning, that tuning may take."""
GRACE_SECONDS = 8.0
"""Time after the suite's end for the current section to stop and for the closing sections to run."""
DEVICE_IS_BROKEN = 75
"""Exit code of a process that another process should resume."""


def main() -> int:
    """Return the exit code: 0 (success), 1 (a section failed or a kernel was wrong), 2 (no device), 75 (resume)."""
    arguments = _arguments()
    if arguments.device == "cpu":
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["QUASAR_CACHE"] = str(arguments.output)  # the interpreter's times are useless for tuning
    import torch

    from scripts.gpu_suite import (
        bars,
        bench,
        compiled,
        correctness,
        decoding,
        environment,
        overhead,
        passes,
        plots,
        simulation,
        tune,
    )
    from scripts.gpu_suite.plan import Plan
    from scripts.gpu_suite.record import Recorder

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device; --device cpu --tiny only exercises the suite itself", file=sys.stderr)
        return 2
    plan = Plan(torch.device(arguments.device), arguments.tiny, arguments.smollm2, arguments.trace)
    recorder = Recorder(arguments.output, arguments.seconds, arguments.resume)
    sections: dict[str, Callable[[], object]] = {
        "environment": lambda: environment.measure(plan),
        "correctness": lambda: correctness.measure(plan, recorder),
        "tuning": lambda: tune.measure(plan, recorder.seconds_left() * TUNING_SHARE),
        "products": lambda: bench.measure(plan, recorder),
        "passes": lambda: passes.measure(plan, recorder),
        "overhead": lambda: overhead.measure(plan, recorder),
        "decoding": lambda: decoding.measure(plan, recorder),
        "compiled": lambda: compiled.measure(plan, recorder),
        "simulation": lambda: simulation.measure(plan, recorder.results.get("passes", [])),
        "bars": lambda: bars.measure(recorder.results),
        "plots": lambda: plots.draw(recorder.results, arguments.output),
    }
    _exit_when_hanging(max(recorder.seconds_left(), 0) + GRACE_SECONDS)
    for name, section in sections.items():
        if name != "tuning" or arguments.tune:
            recorder.run(name, section)
        if plan.device.type == "cuda" and not environment.answers():
            return DEVICE_IS_BROKEN
    return recorder.finish()


def _exit_when_hanging(seconds: float) -> None:
    """End the process, because a wait for a device that does not answer cannot be interrupted."""
    watchdog = threading.Timer(seconds, lambda: os._exit(DEVICE_IS_BROKEN))
    watchdog.daemon = True
    watchdog.start()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_suite.sh", description=__doc__)
    parser.add_argument("output", type=Path, help="folder for results.json and the plots")
    parser.add_argument("--smollm2", type=Path, help="checkpoint folder of SmolLM2, to decode with")
    parser.add_argument("--trace", type=Path, help="generations.jsonl of a run, to turn step times into tokens/s")
    parser.add_argument("--seconds", type=float, default=460, help="time after which sections are cut short")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help="search tilings first")
    parser.add_argument("--resume", action="store_true", help="go on after the last section in OUTPUT's results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for a dry run of the suite itself")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
