"""Verifiers: a model and its KV cache that score a draft in one forward pass. One file and one YAML each."""
