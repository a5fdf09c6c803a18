"""Hydra entry point: ``python run.py verifier=int4 drafter=lookahead``."""

import sys

from quasar.experiment.entry import guarded


def run() -> int:
    from quasar.experiment.main import main

    return main()


if __name__ == "__main__":
    sys.exit(guarded(run))
