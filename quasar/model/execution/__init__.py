"""How a pass of the model runs: eagerly, as a CUDA graph, or from a CPU tape."""
