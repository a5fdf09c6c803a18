"""Prompts, calibration text, and measures of the output: fidelity, task accuracy, exactness."""
