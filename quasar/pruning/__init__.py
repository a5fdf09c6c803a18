"""Structured pruning: narrower blocks (width) through torch-pruning's dependency graph, or fewer blocks (depth)."""
