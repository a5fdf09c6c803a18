"""Benchmark of all ops: ``python -m kernels.bench``."""
