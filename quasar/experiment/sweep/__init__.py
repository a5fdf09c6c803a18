"""Multiruns that survive: planned, resumed, launched and reported as one. Hydra's side is hydra_plugins/."""
