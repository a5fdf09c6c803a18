"""Runs a single experiment from its configuration to its summary, and sweeps of such runs."""
