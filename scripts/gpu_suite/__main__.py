"""Run every section, each on its own: a failure is recorded with its traceback, and what was measured is kept."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    arguments = _arguments()
    if arguments.device == "cpu":
        # Read when Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["QUASAR_CACHE"] = str(arguments.output)  # tilings chosen by an interpreter's times are worthless
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
        print("PyTorch sees no CUDA device; --device cpu --tiny only exercises the suite itself", file=sys.stderr)
        return 2
    plan = Plan(torch.device(arguments.device), arguments.tiny, arguments.smollm2, arguments.trace)
    recorder = Recorder(arguments.output, arguments.seconds)
    recorder.run("environment", lambda: environment.measure(plan))
    recorder.run("correctness", lambda: correctness.measure(plan))
    if arguments.tune:
        recorder.run("tuning", lambda: tune.measure(plan, recorder.seconds_left() * 0.25))
    recorder.run("products", lambda: bench.measure(plan, recorder))
    recorder.run("passes", lambda: passes.measure(plan, recorder))
    recorder.run("overhead", lambda: overhead.measure(plan))
    recorder.run("decoding", lambda: decoding.measure(plan))
    recorder.run("programmatic_passes", lambda: passes.measure_programmatic(plan))
    recorder.run("simulation", lambda: simulation.measure(plan, recorder.results.get("passes", [])))
    recorder.run("compiled", lambda: compiled.measure(plan, recorder))
    recorder.run("bars", lambda: bars.measure(recorder.results))
    recorder.run("plots", lambda: plots.draw(recorder.results, arguments.output))
    return recorder.finish()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_suite.sh", description=__doc__)
    parser.add_argument("output", type=Path, help="folder for results.json and the plots")
    parser.add_argument("--smollm2", type=Path, help="checkpoint folder of SmolLM2, to decode with")
    parser.add_argument("--trace", type=Path, help="generations.jsonl of a run, to turn step times into tokens/s")
    parser.add_argument("--seconds", type=float, default=460, help="time after which sections are cut short")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help="search tilings first")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for a dry run of the suite itself")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
