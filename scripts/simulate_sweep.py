"""Write a sweep that never ran, to try ``quasar collect`` at size: ``simulate_sweep.py FOLDER [RUNS]``."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from quasar.config.schema import CONF, register
from quasar.results.attempt import Status
from quasar.results.generations import GENERATIONS
from quasar.results.metrics import METRICS
from quasar.results.schema import PromptRecord

VERIFIERS = ("fp16", "int8", "int4", "pruned")
DRAFTERS = ("ngram", "lookahead", "layerskip")
TEMPERATURES = (0.0, 1.0)
MACHINES = ("node-1", "node-2", "node-3")
FAILED, PARTIAL = 0.02, 0.01
PROMPTS = 10


def main(folder: Path, runs: int) -> None:
    """``runs`` folders: two in a hundred failed, one in a hundred was killed, the others are done."""
    dice = random.Random(0)
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = [
            compose("config", [f"verifier={verifier}", f"drafter={drafter}", f"decode.temperature={temperature}"])
            for verifier, drafter, temperature in itertools.product(VERIFIERS, DRAFTERS, TEMPERATURES)
        ]
    templates = [(OmegaConf.to_container(config), OmegaConf.to_yaml(config)) for config in configs]
    for number in range(runs):
        config, text = templates[number % len(templates)]
        # Composing and dumping every configuration anew would take most of the time.
        text = text.replace("\nseed: 0\n", f"\nseed: {number // len(templates)}\n")
        state = dice.choices(("failed", "partial", "done"), (FAILED, PARTIAL, 1 - FAILED - PARTIAL))[0]
        write_run(folder / str(number), config, text, state, dice)


def write_run(folder: Path, config: dict, text: str, state: str, dice: random.Random) -> None:
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    (folder / "config.yaml").write_text(f"# config hash: {key}\n# command: simulated\n{text}")
    (folder / "environment.json").write_text(json.dumps({"prompts": PROMPTS}) + "\n")
    status = Status(
        status="running" if state == "partial" else state,
        error="Traceback (most recent call last):\nRuntimeError: simulated" if state == "failed" else None,
        time="2026-01-01T00:00:00+0000",
        config_hash=key,
        code_versions=["simulated"],
        machines=[dice.choice(MACHINES)],
        pid=1,
    )
    (folder / "status.json").write_text(json.dumps(status.to_json()) + "\n")
    finished = PROMPTS if state == "done" else dice.randrange(PROMPTS)
    line = json.dumps(PromptRecord("simulated", "simulated", []).to_json()) + "\n"
    (folder / GENERATIONS).write_text(line * finished)
    if state == "done":
        (folder / "summary.json").write_text(json.dumps(simulated_summary(config, dice)) + "\n")


def simulated_summary(config: dict, dice: random.Random) -> dict:
    """Every key that a run's summary has; most were not measured."""
    acceptance = dice.uniform(0.2, 0.8)
    measured = {
        "model": config["model"]["name"],
        "drafter": config["drafter"]["name"],
        "verifier": config["verifier"]["name"],
        "data": config["data"]["name"],
        "temperature": config["decode"]["temperature"],
        "prompts": PROMPTS,
        "tokens_generated": 64 * PROMPTS,
        "tokens_per_second": dice.uniform(20, 80),
        "mean_acceptance_length": 1 + 2 * acceptance,
        "acceptance_rate": acceptance,
        "acceptance_by_position": [acceptance, acceptance**2],
        "speedup_ci95": [1.0, 1.5],
        "device": "simulated",
    }
    return {metric.name: measured.get(metric.name) for metric in METRICS if metric.in_summary}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)
