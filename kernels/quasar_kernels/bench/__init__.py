"""Benchmark of all ops: ``python -m quasar_kernels.bench``."""
