"""Executors, which run the passes of a model eagerly, as CUDA graphs, or from a CPU tape."""
