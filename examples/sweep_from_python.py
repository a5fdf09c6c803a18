"""A sweep from Python instead of the command line: every pair is composed by Hydra, executed, and returned as a row.

    python examples/sweep_from_python.py FOLDER

Runs are ordinary runs: `quasar collect FOLDER` and the notebooks read them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from quasar.config.schema import CONF, register
from quasar.experiment.memory import release_memory
from quasar.experiment.run import run
from quasar.results.console import Reporter
from quasar.results.schema import Json


def composed(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/config.yaml with overrides, as ``run.py`` would."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def sweep(folder: Path, drafters: Iterable[str], verifiers: Iterable[str], common: Sequence[str] = ()) -> list[Json]:
    """Execute every pair in a folder of its own, and return their summaries.

    common: overrides of all runs, such as ``data.limit=1``
    """
    summaries = []
    for drafter, verifier in product(drafters, verifiers):
        overrides = [f"drafter={drafter}", f"verifier={verifier}", "resume=true", *common]
        summaries.append(run(composed(overrides), folder / f"{drafter}_{verifier}", overrides, Reporter()))
        release_memory()
    return summaries


if __name__ == "__main__":
    rows = sweep(Path(sys.argv[1]), ("ngram", "lookahead"), ("fp16", "int8"), ["data.limit=1", "threads=2"])
    for row in rows:
        names = f"{row['drafter']:>10} {row['verifier']:>6}"
        print(f"{names}  {row['tokens_per_second']:6.1f} tokens/s  τ_ref {row['mean_acceptance_length_ref']:.2f}")
