"""Quantizers: pure functions on weights and statistics, and the layers that hold their results."""
