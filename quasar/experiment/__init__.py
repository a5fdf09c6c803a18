"""One run from configuration to summary, and sweeps of runs."""
