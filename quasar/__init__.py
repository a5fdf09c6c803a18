"""Quasar: speculative decoding with cheap verification, measured so that a reviewer trusts it."""

__version__ = "0.1.0"
