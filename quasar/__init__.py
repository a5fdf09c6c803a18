"""Quasar: an experiment framework for speculative decoding with quantized and pruned verifiers."""

import os

__version__ = "0.1.0"

SPINS = "400"
"""How often a thread of OpenMP looks for work before it sleeps, about 10 µs.

By default it looks for milliseconds. If another process is busy, the threads then spin for each other instead of giving
the core to the one that has work, and a run loses far more than its share of the cores. Between the ops of a pass
threads still do not sleep. OpenMP reads the number when PyTorch is loaded, so it is set here.
"""
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS
