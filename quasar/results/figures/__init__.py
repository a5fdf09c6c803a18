"""Figures of a table of runs: one style, one function per figure, and the command ``quasar plot``."""
