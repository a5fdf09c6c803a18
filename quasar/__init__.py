"""Quasar: an experiment framework for speculative decoding with quantized and pruned verifiers."""

__version__ = "0.1.0"
