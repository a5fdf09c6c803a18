"""Structured pruning: narrower decoder blocks (width), with torch-pruning's dependency graph, or fewer (depth)."""
