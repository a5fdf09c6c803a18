"""The command ``quasar doctor``: what of this machine works, what a run falls back to, and what to do about it."""
