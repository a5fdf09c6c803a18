"""Hydra entry point: ``python run.py verifier=int4 drafter=lookahead``."""

import sys

from quasar.experiment.main import main

if __name__ == "__main__":
    sys.exit(main())
