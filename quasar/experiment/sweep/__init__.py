"""Sweeps (Hydra multiruns): plans, resumes and reports all jobs of a sweep. The Hydra plugins are in hydra_plugins/."""
